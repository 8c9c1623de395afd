"""A few small steps of each CUDA backend, for compute-sanitizer, which makes everything a hundred times slower.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor an allocation: memcheck sees its end

import torch
from providers import obstacle

import vadiff

# A length that no vector divides; samples split over blocks; more samples than one tile of statistics.
_SHAPES = ((5, 3, 33, 35), (2, 40_003), (2_051, 7))


def main() -> int:
    ran = 0
    for backend in ("native", "triton"):
        reason = obstacle(backend, "cuda")
        if reason is not None:
            print(f"{backend}: not usable: {reason}")
            continue
        criterion = vadiff.DiffusionLoss(backend=backend).cuda()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in _SHAPES:
                prediction = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
                target = torch.randn(shape, device="cuda").to(dtype)
                log_snr = 4 * torch.randn(shape[0], device="cuda")
                for reduction in ("mean", "none"):  # fused and deferred
                    criterion(prediction, target, log_snr, reduction=reduction).sum().backward()
        torch.cuda.synchronize()
        ran += 1
        print(f"{backend}: ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
