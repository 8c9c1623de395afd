"""Streams of a GPU, and batches that several blocks settle: what the emulation of the kernels cannot get wrong."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from test_gpu_loss import backend, batch, step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vadiff

__all__ = ["backend"]  # the fixture

LONG = 200_000_000  # cycles, some 0.1 s


class Passing(TorchDispatchMode):
    """Sees every operator and changes nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


def results_of(criterion: vadiff.DiffusionLoss, prediction: Tensor, loss: Tensor) -> list[Tensor]:
    assert prediction.grad is not None
    return [loss, prediction.grad, *criterion.statistics.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fused", "deferred"])
def test_a_step_runs_on_the_current_stream(backend: str, dtype: torch.dtype) -> None:
    prediction, target, log_snr = batch((512, 3, 32, 32), dtype)
    expected = vadiff.DiffusionLoss(backend=backend).cuda()
    loss = step(expected, prediction, target, log_snr)
    truth = [x.clone() for x in results_of(expected, prediction, loss)]

    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    late = torch.zeros_like(prediction).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)  # what does not wait for this stream reads zeros
        with torch.no_grad():
            late.copy_(prediction)
        loss = step(criterion, late, target, log_snr)
    torch.cuda.synchronize()
    for found, wanted in zip(results_of(criterion, late, loss), truth, strict=True):
        assert torch.equal(found, wanted)


def test_a_backward_called_under_another_stream_waits_for_its_forward(backend: str) -> None:
    prediction, target, log_snr = batch((512, 3, 32, 32))
    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    (truth,) = torch.autograd.grad(copy.deepcopy(criterion)(prediction, target, log_snr), prediction)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    loss = criterion(prediction, target, log_snr)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        upstream = torch.full((), 0.5, device="cuda")
        (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    torch.cuda.synchronize()
    torch.testing.assert_close(gradient, truth / 2, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [2049, 40_000])
def test_a_step_through_the_dispatcher_computes_the_same_bits(backend: str, samples: int) -> None:
    found = []
    for mode in (contextlib.nullcontext(), Passing()):
        prediction, target, log_snr = batch((samples, 3, 4, 4))
        criterion = vadiff.DiffusionLoss(backend=backend).cuda()
        with mode:
            for _ in range(3):
                loss = step(criterion, prediction, target, log_snr)
        assert criterion.per_sample_loss is not None
        found.append([*results_of(criterion, prediction, loss), criterion.per_sample_loss])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("samples", [512, 2049, 40_000])
def test_reweighted_losses_agree_with_the_reference(backend: str, samples: int) -> None:
    fused, truth = (vadiff.DiffusionLoss(backend=name).cuda() for name in (backend, "reference"))
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(3):
        losses = torch.rand(samples, device="cuda", generator=generator) + 0.1
        log_snr = 4 * torch.randn(samples, device="cuda", generator=generator)
        weighted = fused.reweight(losses, log_snr)
        expected = truth.reweight(losses.double(), log_snr)
        torch.testing.assert_close(weighted.double(), expected, rtol=2e-5, atol=0)
    for name in ("count", "mean", "variance", "mass"):
        torch.testing.assert_close(
            getattr(fused.statistics, name), getattr(truth.statistics, name), rtol=2e-5, atol=0, equal_nan=True
        )
