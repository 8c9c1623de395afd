"""Validation on a GPU: the levels and the noise of the CPU, to the bit."""

from __future__ import annotations

import torch

from vadiff.validation import LevelValidation


def test_gpu_gets_the_levels_and_noise_of_the_cpu() -> None:
    validation = LevelValidation(5, log_snr_range=(-6.0, 6.0))
    indices = torch.randperm(64)
    on_cpu, on_gpu = (validation.draw(indices, (64, 3, 8, 8), device) for device in ("cpu", "cuda"))
    assert all(found.device.type == "cuda" for found in on_gpu)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(on_cpu, on_gpu, strict=True))
    for log_snr, noise in (on_cpu, on_gpu, validation.draw(indices.cuda(), (64, 3, 8, 8))):
        validation.add(indices, log_snr, noise.square().flatten(1).mean(1))
        assert validation.result().samples.sum() == 64
