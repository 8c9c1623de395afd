"""Work shared among several devices, each of which takes the next batch when it is free."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor


def draw(
    sample: Callable[[torch.device, Sequence[int]], Tensor],
    seeds: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """Draw images on several devices, each of which takes the next batch when it is free.

    Args:
        sample: (device, seeds of a batch) → images [B, ...], called in one thread per device.
        seeds: one per image.
        devices: at least one; a device named twice gets two threads.
        batch_size: images per batch on each device.

    Yields:
        (index of its first image among the seeds, images) of each batch, in order of completion.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    stopped = threading.Event()

    def work(start: int) -> tuple[int, Tensor] | None:
        if stopped.is_set():
            return None
        device = free.get()
        try:
            return start, sample(device, seeds[start : start + batch_size])
        except BaseException:
            stopped.set()
            raise
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as threads:
        batches = [threads.submit(work, start) for start in range(0, len(seeds), batch_size)]
        try:
            for batch in as_completed(batches):
                if (drawn := batch.result()) is not None:
                    yield drawn
        finally:  # after an error or an early stop of the caller, batches not yet begun return at once
            stopped.set()
