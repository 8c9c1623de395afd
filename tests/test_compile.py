"""A training step under torch.compile(fullgraph=True) does what it does in eager mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import assert_variance_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import compile_fx

import vadiff

FIELDS = ("count", "mean", "variance", "mass")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Run:
    """A small network and a criterion; two runs start alike and see the same data."""

    def __init__(self, make_criterion, device: torch.device, dtype: torch.dtype, **call: object) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 6)).to(device)
        self.criterion = make_criterion(vadiff.weighting.VarianceAware(prior=2.0), half_life=8.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.generator, self.device, self.dtype, self.call = (
            torch.Generator().manual_seed(1),
            device,
            dtype,
            call,
        )

    def loss(self, noisy: torch.Tensor, clean: torch.Tensor, log_snr: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        prediction = self.model(noisy).to(self.dtype)
        loss = self.criterion(prediction, clean, log_snr, sample_weight=v, **self.call)
        return loss if loss.ndim == 0 else loss.mean()

    def train(self, step, batches: tuple[int, ...]) -> list[float]:
        losses = []
        for size in batches:
            clean = torch.randn(size, 6, generator=self.generator)
            log_snr = 3 * torch.randn(size, generator=self.generator)
            noisy = clean + torch.exp(-log_snr / 2)[:, None] * torch.randn(size, 6, generator=self.generator)
            v = torch.rand(size, generator=self.generator)
            self.optimizer.zero_grad()
            loss = step(*(x.to(self.device) for x in (noisy.clamp(-5, 5), clean, log_snr, v)))
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def assert_alike(eager: Run, losses: list[float], compiled: Run, compiled_losses: list[float], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(compiled_losses), torch.tensor(losses), rtol=rtol, atol=0)
    mine, theirs = (
        {name: getattr(run.criterion.statistics, name).cpu() for name in FIELDS} for run in (compiled, eager)
    )
    for name in ("count", "mean", "mass"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=0, equal_nan=True, msg=name)
    count, mean, variance = (theirs[name].numpy() for name in ("count", "mean", "variance"))
    assert_variance_close(mine["variance"].numpy(), count, mean, variance, rtol)
    torch.testing.assert_close(compiled.criterion.weights, eager.criterion.weights, rtol=rtol, atol=0)
    assert eager.criterion.statistics.count.sum() > 0
    assert eager.criterion.weights.max() > 1.05 * eager.criterion.weights.min()


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.bfloat16, "none")])
def test_ten_steps_traced_whole_match_eager_and_compile_once(make_criterion, device, dtype, reduction):
    eager, compiled = (Run(make_criterion, device, dtype, reduction=reduction) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.loss, fullgraph=True, backend=counter, dynamic=False)
    sizes = (5,) * 10
    losses, compiled_losses = eager.train(eager.loss, sizes), compiled.train(step, sizes)
    assert counter.frame_count == 1
    assert_alike(eager, losses, compiled, compiled_losses, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_changing_batch_sizes_do_not_recompile_each_time(make_criterion, device):
    eager, compiled = (Run(make_criterion, device, torch.float32) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.loss, fullgraph=True, backend=counter)
    sizes = (5, 4, 7, 3, 9, 5)
    losses, compiled_losses = eager.train(eager.loss, sizes), compiled.train(step, sizes)
    assert counter.frame_count <= 2  # the first size, then one graph for any size
    assert_alike(eager, losses, compiled, compiled_losses, rtol=1e-5)


def test_ten_steps_with_the_default_compiler_match_eager(make_criterion, device):
    eager, compiled = (Run(make_criterion, device, torch.float32) for _ in range(2))
    step = torch.compile(compiled.loss, fullgraph=True)
    sizes = (5,) * 10
    losses, compiled_losses = eager.train(eager.loss, sizes), compiled.train(step, sizes)
    assert_alike(eager, losses, compiled, compiled_losses, rtol=1e-4)


def test_the_compilers_advice_on_tf32_is_no_failure(monkeypatch):
    """What inductor says on a GPU when it meets a float32 matmul, under this project's filter of warnings."""
    advise = getattr(compile_fx, "_warn_tf32_disabled", None)
    if advise is None:
        pytest.skip("this torch has no such advice")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    advise.__wrapped__()  # not the one that remembers that it has spoken


def test_reweight_is_traced_whole(make_criterion, device):
    eager, compiled = make_criterion(), make_criterion()
    step = torch.compile(
        lambda losses, log_snr: compiled.reweight(losses, log_snr).mean(), fullgraph=True, backend="aot_eager"
    )
    for _ in range(3):
        losses, log_snr = torch.rand(30, device=device), 3 * torch.randn(30, device=device)
        x, y = losses.clone().requires_grad_(), losses.clone().requires_grad_()
        eager.reweight(x, log_snr).mean().backward()
        step(y, log_snr).backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(eager.statistics.mean, compiled.statistics.mean, rtol=1e-12, atol=0, equal_nan=True)
    assert eager.statistics.count.sum() > 80


def test_eval_mode_is_traced_whole_and_records_nothing(make_criterion, device):
    criterion = make_criterion().eval()
    step = torch.compile(lambda *batch: criterion(*batch), fullgraph=True, backend="aot_eager")
    batch = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device), torch.zeros(4, device=device)
    torch.testing.assert_close(step(*batch), torch.nn.functional.mse_loss(*batch[:2]))
    assert criterion.statistics.count.sum() == 0
    criterion.train()
    step(*batch)
    assert criterion.statistics.count.sum() > 0


def test_one_tensor_for_two_arguments_is_traced_whole(make_criterion, device):
    criteria = [make_criterion(), make_criterion()]
    torch.manual_seed(0)
    x, u, log_snr = torch.randn(6, 5, device=device), torch.rand(6, device=device) + 0.5, torch.randn(6, device=device)

    def run(criterion: torch.nn.Module, prediction: torch.Tensor) -> torch.Tensor:
        return criterion(prediction, x, log_snr, noise=x, coefficients=(1.0, -1.0, 0.5), base_weight=u, sample_weight=u)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for function, criterion in zip((run, compiled), criteria, strict=True):
        for _ in range(2):
            prediction = (2 * x).requires_grad_()
            function(criterion, prediction).backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(criteria[0].statistics.state, criteria[1].statistics.state)


def test_a_learned_base_weight_gets_its_gradient_when_compiled(make_criterion, device):
    x, log_snr = torch.randn(6, 5, device=device), torch.randn(6, device=device)
    gradients = []
    for compiler in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        criterion = make_criterion()
        level = torch.zeros(6, device=device, requires_grad=True)
        prediction = (2 * x).requires_grad_()
        step = compiler(lambda p, u, criterion=criterion: criterion(p, x, log_snr, base_weight=u.exp()))
        step(prediction, level).backward()
        gradients.append((prediction.grad, level.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
