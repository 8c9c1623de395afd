"""Two processes of a test, as ranks of one process group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

# What most ranks import when they train: 5 seconds of each.
IMPORTED_ONCE = ["torch._dynamo", "diffusers.models.unets.unet_2d", "vadiff.training", "pytest"]


def start_two_ranks(function: Callable[..., NoReturn], *arguments: object) -> Any:
    """Two processes that call function(rank, *arguments); returns torch's context of them. They are forked from a
    process that has imported what they need, and done nothing else: of one that has trained no training can be forked.
    """
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    return torch.multiprocessing.start_processes(function, arguments, nprocs=2, join=False, start_method="forkserver")


def run_two_ranks(function: Callable[..., NoReturn], *arguments: object) -> None:
    """Start them, and wait for their end."""
    context = start_two_ranks(function, *arguments)
    while not context.join():
        pass


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
