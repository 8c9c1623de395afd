"""Two processes of a test, as ranks of one process group."""

from __future__ import annotations

import datetime
import os
import sys
from typing import NoReturn

import torch


def join_two_ranks(rank: int, folder: str) -> None:
    """Make this process one of two that meet in `folder`, by gloo. One that stays away ends the other in a minute."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )


def leave_two_ranks() -> NoReturn:
    """End this process when both ranks are done: call it last, with the results in files.

    Without Python's and C++'s tidying up at exit: gloo's threads abort a process there now and then, most of all with a
    DistributedDataParallel that still holds the group.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
