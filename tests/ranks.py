"""Two processes of a test, as ranks of one process group."""

from __future__ import annotations

import datetime

import torch


def join_two_ranks(rank: int, folder: str) -> None:
    """Make this process one of two that meet in `folder`, by gloo. One that stays away ends the other in a minute."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )


def leave_two_ranks() -> None:
    """End the process group together: gloo aborts a process that ends while the other one still talks to it."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
