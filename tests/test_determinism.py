"""The same inputs give the same bits."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(make_criterion, device: torch.device, dtype: torch.dtype, loss: str, reduction: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    criterion, seen = make_criterion(loss=loss), []
    for size in (7, 2):
        prediction = randn(size, 3, 50).to(device, dtype).requires_grad_()
        target, noise = randn(size, 3, 50).to(device, dtype), randn(size, 3, 50).to(device, dtype)
        log_snr, u, v = (
            (4 * randn(size)).to(device),
            randn(size).exp().to(device),
            randn(size).exp().to(device),
        )
        u.requires_grad_()
        out = criterion(
            prediction,
            target,
            log_snr,
            noise=noise,
            coefficients=(1.0, v, -0.5),
            base_weight=u,
            sample_weight=v,
            reduction=reduction,
        )
        seen += [out.detach(), *torch.autograd.grad(out.mean(), (prediction, u))]
        losses = criterion.per_sample_loss.clone().requires_grad_()
        out = criterion.reweight(losses, log_snr, v)
        seen += [out.detach(), *torch.autograd.grad(out.mean(), losses)]
    s = criterion.statistics
    return [*seen, s.count, s.mean, s.variance, s.mass, s.skipped, criterion.weights]


@pytest.mark.parametrize(
    ("dtype", "loss", "reduction"),
    [
        (torch.float32, "mse", "mean"),
        (torch.float32, "huber", "none"),
        (torch.bfloat16, "huber", "mean"),
        (torch.float16, "mse", "none"),
    ],
)
def test_repeated_runs_give_the_same_bits(make_criterion, device, dtype, loss, reduction):
    first = run(make_criterion, device, dtype, loss, reduction)
    second = run(make_criterion, device, dtype, loss, reduction)
    assert len(first) == 16
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_sample_has_the_same_loss_and_gradient_in_any_batch(make_criterion, device):
    """Bits of ℓ do not depend on the neighbours: what makes runs on 1 and on 8 ranks comparable."""
    criterion = make_criterion("constant")
    batch = torch.randn(20, 3, 41, device=device), torch.randn(20, 3, 41, device=device), torch.randn(20, device=device)
    together = criterion(*batch, reduction="none")
    apart = [criterion(*(x[i : i + 5] for x in batch), reduction="none") for i in range(0, 20, 5)]
    assert torch.equal(together, torch.cat(apart))
