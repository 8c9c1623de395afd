"""What only a GPU can show: results of the compiled kernels, races, launches, syncs, memory, graphs, large tensors.

The suite in the folder above runs its Triton tests on the GPU too, where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_variance_close
from torch import Tensor
from waits import waits_are_errors

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.ops.reference import moments_of, weight_table


@pytest.fixture(params=["triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if not vadiff.backend_report()[request.param][0] or (request.param == "native" and not built_with_cuda()):
        pytest.skip(f"{request.param} cannot run here: {vadiff.backend_report()[request.param][1]}")
    name: str = request.param
    return name


def built_with_cuda() -> bool:
    from vadiff.ops import native

    return native.CUDA_ARCHITECTURES is not None


# The last two have more samples than one block settles; "odd" ones no whole vectors per sample.
SHAPES = {
    "cifar": (512, 3, 32, 32), "latent": (64, 4, 64, 64), "video": (2, 16, 8, 30, 45), "odd": (33, 3, 17, 19),
    "many": (5003, 4, 4, 2), "odd-many": (2500, 3, 5, 7),
}  # fmt: skip


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction (requires grad), target and log-SNR, with losses that vary over the levels."""
    generator = torch.Generator("cuda").manual_seed(seed)
    log_snr = 4 * torch.randn(shape[0], device="cuda", generator=generator)
    target = torch.randn(shape, device="cuda", generator=generator)
    error = torch.randn(shape, device="cuda", generator=generator)
    error = error * (0.2 * log_snr).exp().view(-1, *[1] * (len(shape) - 1))
    return (target + error).to(dtype).requires_grad_(), target.to(dtype), log_snr


def step(criterion: vadiff.DiffusionLoss, prediction: Tensor, target: Tensor, log_snr: Tensor) -> Tensor:
    prediction.grad = None
    loss: Tensor = criterion(prediction, target, log_snr)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_kernels_agree_with_the_reference_over_several_steps(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    fused = vadiff.DiffusionLoss(backend=backend).cuda()
    truth = vadiff.DiffusionLoss(backend="reference").cuda()
    for seed in range(4):
        prediction, target, log_snr = batch(shape, dtype, seed)
        if channels_last:
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            prediction = prediction.detach().to(memory_format=layout).requires_grad_()
        table = fused.statistics.log_weights.clone()
        loss = step(fused, prediction, target, log_snr)
        double = prediction.detach().double().requires_grad_()
        # The same table: the reference's own differs by the rounding of the losses, times mean / std.
        truth.statistics.log_weights.copy_(table)
        expected = step(truth, double, target.double(), log_snr)
        assert prediction.grad is not None
        assert double.grad is not None
        assert prediction.grad.stride() == prediction.stride()
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
        rounded = double.grad.to(dtype).double()  # what the best gradient in this dtype loses
        allowed = 2 * (rounded - double.grad).abs() + 3e-6 * double.grad.abs() + 1e-6 * double.grad.abs().max()
        assert ((prediction.grad.double() - double.grad).abs() <= allowed).all()
    fields = ("count", "mean", "mass", "variance")
    mine, theirs = ([getattr(c.statistics, name).cpu().numpy() for name in fields] for c in (fused, truth))
    for name, one, other in zip(fields[:3], mine, theirs, strict=False):
        np.testing.assert_allclose(one, other, rtol=2e-5, err_msg=name)
    count, mean, _, variance = theirs
    assert_variance_close(mine[3], count, mean, variance)
    # The table of its own statistics: the reference's differs by the rounding of the losses, amplified by mean / std.
    bins = fused.statistics.bins
    table = weight_table(moments_of(fused.statistics.state, bins), bins, fused.weighting.rule)
    torch.testing.assert_close(fused.weights, table.exp(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("samples", [512, 5000, 40_000])
def test_fifty_runs_give_the_same_bits(backend: str, samples: int) -> None:
    prediction, target, log_snr = batch((samples, 3, 32, 32) if samples <= 5000 else (samples, 16))
    first: list[Tensor] = []
    for _ in range(50):
        criterion = vadiff.DiffusionLoss(backend=backend).cuda()
        losses = [step(criterion, prediction, target, log_snr) for _ in range(3)]
        assert prediction.grad is not None
        found = [*losses, prediction.grad.clone(), criterion.statistics.state, criterion.statistics.log_weights]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def kernels_launched(run: Callable[[], object]) -> list[str]:
    run()  # compile first
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("samples", [512, 2048, 2049])
def test_a_step_takes_few_launches_forward_and_one_backward(backend: str, samples: int) -> None:
    forward = (1 if backend == "native" else 2) + (samples > 2048)
    prediction, target, log_snr = batch((samples, 3, 32, 32))
    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    assert len(kernels_launched(lambda: criterion(prediction, target, log_snr))) == forward
    upstream = torch.ones((), device="cuda")

    def forward_and_backward() -> None:
        torch.autograd.grad(criterion(prediction, target, log_snr), prediction, upstream)

    assert len(kernels_launched(forward_and_backward)) == forward + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fused", "deferred"])
def test_a_step_does_not_wait_for_the_device(backend: str, dtype: torch.dtype) -> None:
    prediction, target, log_snr = batch(SHAPES["cifar"], dtype)
    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    step(criterion, prediction, target, log_snr)
    with waits_are_errors():
        step(criterion, prediction, target, log_snr)


def test_peak_memory_is_one_gradient_buffer(backend: str) -> None:
    prediction, target, log_snr = batch((64, 4, 128, 128))
    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    torch.autograd.grad(criterion(prediction, target, log_snr), prediction)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient = torch.autograd.grad(criterion(prediction, target, log_snr), prediction)
    extra = torch.cuda.max_memory_allocated() - before
    assert gradient[0].nbytes <= extra <= 1.02 * gradient[0].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fused", "deferred"])
def test_statistics_go_on_moving_when_a_cuda_graph_is_replayed(backend: str, dtype: torch.dtype) -> None:
    static = batch(SHAPES["cifar"], dtype)
    captured = vadiff.DiffusionLoss(backend=backend).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, *static)
    torch.cuda.current_stream().wait_stream(stream)
    captured.statistics.reset()
    eager = copy.deepcopy(captured)
    graph = torch.cuda.CUDAGraph()
    static[0].grad = None
    with torch.cuda.graph(graph):
        loss = captured(*static)
        loss.backward()
    for seed in range(5):
        fresh = batch(SHAPES["cifar"], dtype, seed)
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        assert static[0].grad is not None
        static[0].grad.zero_()
        graph.replay()
        assert torch.equal(loss, step(eager, *fresh))
        assert torch.equal(static[0].grad, fresh[0].grad)
    assert torch.equal(captured.statistics.state, eager.statistics.state)
    assert captured.statistics.count.sum() > 2000


def capture(criterion: vadiff.DiffusionLoss, static: tuple[Tensor, Tensor, Tensor]) -> tuple[Callable, Tensor, Tensor]:
    """A CUDA graph of one step on static inputs: its replay, and the loss and the gradient that it writes."""

    def run() -> tuple[Tensor, Tensor]:
        loss = criterion(*static)
        return loss.detach(), torch.autograd.grad(loss, static[0])[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = run()
    return graph.replay, loss, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fused", "deferred"])
def test_two_graphs_of_one_criterion_and_one_of_another_replay_in_turns(backend: str, dtype: torch.dtype) -> None:
    shapes, owners = ("cifar", "odd-many", "odd"), (0, 0, 1)
    criteria = [vadiff.DiffusionLoss(backend=backend).cuda() for _ in range(2)]
    statics = [batch(SHAPES[shape], dtype) for shape in shapes]
    graphs = [capture(criteria[owner], static) for owner, static in zip(owners, statics, strict=True)]
    for criterion in criteria:
        criterion.statistics.reset()
    eager = copy.deepcopy(criteria)
    for seed, turn in enumerate((0, 1, 2, 1, 1, 0, 2, 2, 0, 1)):
        fresh, (replay, loss, gradient) = batch(SHAPES[shapes[turn]], dtype, seed), graphs[turn]
        with torch.no_grad():
            for old, new in zip(statics[turn], fresh, strict=True):
                old.copy_(new)
            for written in (loss, gradient):
                written.fill_(torch.nan)
        replay()
        assert torch.equal(loss, step(eager[owners[turn]], *fresh))
        assert torch.equal(gradient, fresh[0].grad)
    for mine, theirs in zip(criteria, eager, strict=True):
        assert torch.equal(mine.statistics.state, theirs.statistics.state)
        assert torch.equal(mine.statistics.log_weights, theirs.statistics.log_weights)
        assert mine.statistics.count.sum() > 50


def test_tensors_of_more_than_two_to_the_31_elements(backend: str) -> None:
    if torch.cuda.mem_get_info()[1] < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GiB of memory")
    shape = (3, 2**30 - 2**20)  # 3.2e9 elements, 6 GiB in bfloat16
    prediction = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros_like(prediction)
    target[2, -7:] = 1.0
    prediction.requires_grad_()
    criterion = vadiff.DiffusionLoss("constant", loss="mse", backend=backend).cuda()
    criterion(prediction, target, torch.zeros(3, device="cuda"), reduction="none").sum().backward()
    assert criterion.per_sample_loss is not None
    torch.testing.assert_close(
        criterion.per_sample_loss.cpu(), torch.tensor([0.0, 0.0, 7 / shape[1]]), rtol=1e-5, atol=0
    )
    assert prediction.grad is not None
    assert prediction.grad[2, -7:].tolist() == pytest.approx([-2 / shape[1]] * 7, rel=0.01)
    assert prediction.grad.count_nonzero() == 7
    prediction.grad = None
    criterion(prediction, target, torch.zeros(3, device="cuda")).backward()  # fused
    assert prediction.grad is not None
    assert prediction.grad.count_nonzero() == 7
    assert (prediction.grad[2, -7:] != 0).all()


def test_compiled_steps_match_eager_ones(backend: str) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).cuda()
    criteria = [vadiff.DiffusionLoss(backend=backend).cuda() for _ in range(2)]

    def forward(criterion: vadiff.DiffusionLoss, x: Tensor, log_snr: Tensor) -> Tensor:
        loss: Tensor = criterion(network(x), x, log_snr)
        return loss

    compiled = torch.compile(forward, fullgraph=True)
    for seed in range(10):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(256, 64, device="cuda", generator=generator)
        log_snr = 4 * torch.randn(256, device="cuda", generator=generator)
        gradients = []
        for run, criterion in zip((forward, compiled), criteria, strict=True):
            network.zero_grad()
            run(criterion, x, log_snr).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        criteria[0].statistics.mean, criteria[1].statistics.mean, rtol=1e-5, atol=0, equal_nan=True
    )


def test_a_gradient_scaler_skips_a_batch_with_a_nan_log_snr(backend: str) -> None:
    layer = torch.nn.Linear(32, 32).cuda()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=65536.0)
    criterion = vadiff.DiffusionLoss(backend=backend).cuda()
    x, log_snr = torch.randn(16, 32, device="cuda"), torch.zeros(16, device="cuda")
    for nan, moves in ((False, True), (True, False), (False, True)):
        before = layer.weight.detach().clone()
        with torch.autocast("cuda", torch.float16):
            prediction = layer(x)
        loss = criterion(
            prediction, x, log_snr.masked_fill(torch.arange(16, device="cuda") == 3, torch.nan) if nan else log_snr
        )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) != moves
    assert criterion.statistics.skipped == 1


@pytest.mark.filterwarnings("always::vadiff.errors.DiffusionLossWarning")
def test_wrong_noise_levels_and_an_untrained_head_are_named_without_a_wait(backend: str) -> None:
    criterion = vadiff.DiffusionLoss("learned", backend=backend).cuda()
    prediction, target, _ = batch((64, 32))
    times = torch.rand(64, device="cuda")  # no log-SNR

    def train() -> None:
        with waits_are_errors():
            for _ in range(2000):  # the copy of call 200 is complete long before
                step(criterion, prediction, target, times)

    with pytest.warns(DiffusionLossWarning) as found:
        train()
    assert {True, False} == {"[0, 1]" in str(warning.message) for warning in found}
    assert len(found) == 2


def test_constant_weighting_equals_mse_loss_to_the_ulp(backend: str) -> None:
    prediction, target, log_snr = batch(SHAPES["cifar"])
    loss = step(vadiff.DiffusionLoss("constant", backend=backend).cuda(), prediction, target, log_snr)
    mine = prediction.grad
    prediction.grad = None
    theirs = F.mse_loss(prediction, target)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.detach(), rtol=4e-7, atol=0)
    torch.testing.assert_close(mine, prediction.grad, rtol=1.2e-7, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(backend: str) -> None:
    prediction, target, log_snr = (x.detach().to("cuda:1") for x in batch(SHAPES["odd"]))
    criterion = vadiff.DiffusionLoss(backend=backend).to("cuda:1")
    loss = step(criterion, prediction.requires_grad_(), target, log_snr)
    torch.testing.assert_close(loss, F.mse_loss(prediction, target).detach())
