"""A few small steps of a CUDA backend, for compute-sanitizer, which makes everything a hundred times slower.

python benchmarks/sanitize.py triton    # first without it: Triton compiles, and keeps what it compiled on disk
compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 python benchmarks/sanitize.py native triton

API errors are not reported: torch and Triton query the driver for functions that it may not have.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from providers import obstacle

import vadiff

BACKENDS = ("native", "triton")
# Sample sizes that are and are not multiples of the vector width: the kernels read them in different loops. For both:
# a few samples, few large ones that are split over blocks, and more than one block can finish, with one in the last.
SHAPES = {
    "odd": (5, 3, 33, 35),
    "odd, split": (2, 40_003),
    "odd, many": (2_561, 7),
    "even": (5, 3, 32, 32),
    "even, split": (1, 131_072),
    "even, many": (2_561, 16),
}


def exercise(backend: str, device: str) -> None:
    """All kernels: fused and deferred steps in each dtype, calls that record nothing, and losses computed elsewhere."""
    criterion = vadiff.DiffusionLoss(backend=backend).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES.values():
            prediction = torch.randn(shape, device=device).to(dtype).requires_grad_()
            target, log_snr = torch.randn_like(prediction), 4 * torch.randn(shape[0], device=device)
            for reduction in ("mean", "none"):  # fused and deferred
                upstream = torch.tensor(2.0, device=device)  # not 1, which skips the scaling
                (criterion(prediction, target, log_snr, reduction=reduction).sum() * upstream).backward()
            criterion.eval()
            with torch.no_grad():
                criterion(prediction, target, log_snr)
            criterion.train()
    for samples in (5, 2_561):
        losses, log_snr = torch.rand(samples, device=device, requires_grad=True), torch.randn(samples, device=device)
        criterion.reweight(losses, log_snr).mean().backward()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", help="native, triton (default: both, as far as they can run)")
    backends = parser.parse_args(arguments).backends
    for name in backends:
        if name not in BACKENDS:
            parser.error(f"{name!r} is not a CUDA backend, expected native or triton")
    if not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False: there is nothing to check")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # memcheck then knows the end of each tensor
    obstacles = {backend: obstacle(backend, "cuda") for backend in backends or BACKENDS}
    for backend, reason in obstacles.items():
        if reason is None:
            exercise(backend, "cuda")
            torch.cuda.synchronize()
        print(f"{backend}: {'ran' if reason is None else f'not usable: {reason}'}")
    found = [reason is None for reason in obstacles.values()]
    return 0 if (all if backends else any)(found) else 1


if __name__ == "__main__":
    sys.exit(main())
