"""vadiff.models.edm2 and its layers: each formula in float64, and magnitudes that stay where they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vadiff.models import Denoiser, EDM2UNet, normalize_weights
from vadiff.models.magnitude_preserving import (
    CosineAttention,
    MPConv,
    MPFourier,
    MPLinear,
    MPWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    normalized,
    pixel_norm,
)
from vadiff.pixels import normalised
from vadiff.trainer.data.digits import SIGMA_DATA, digits


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


@pytest.fixture
def network() -> EDM2UNet:
    """Small, with everything in it, and gains that are no longer 0."""
    network = EDM2UNet((3, 8, 8), (8, 16), layers_per_block=1, attention_resolutions=(4,), labels=5, head_channels=8)
    open_gains(network)
    return network


def open_gains(network: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), 0.3 * torch.randn(6) - 0.3, torch.tensor([0, 1, 2, 3, 4, 5])


def test_normalized_divides_by_the_magnitude() -> None:
    x = double(4, 6, 3, 3)
    x[0] = 0.0
    norm = x.pow(2).sum(1, keepdim=True).sqrt()
    assert torch.allclose(pixel_norm(x), x / (1e-4 + norm / math.sqrt(6)), rtol=1e-13, atol=0)
    assert torch.allclose(normalized(x, [1, 2, 3])[1], x[1] / (1e-4 + x[1].norm() / math.sqrt(54)), rtol=1e-13)
    half = normalized((300 * x).half(), [1])  # its squares are beyond float16
    assert half.dtype == torch.float16
    assert rms(half[1:]) == pytest.approx(1.0, abs=1e-3)


def test_silu_keeps_the_magnitude_of_a_normal_variable() -> None:
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(density * mp_silu(x).square(), x).item() == pytest.approx(1.0, abs=2e-3)
    assert torch.allclose(mp_silu(x), x / (1 + (-x).exp()) / 0.596, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_sum_and_concatenation_are_those_of_the_paper_and_keep_magnitude(t: float) -> None:
    a, b = double(5, 30, 4, 4), double(5, 10, 4, 4)
    root = math.sqrt((1 - t) ** 2 + t**2)
    assert torch.allclose(mp_sum(a[:, :10], b, t), ((1 - t) * a[:, :10] + t * b) / root, rtol=1e-12, atol=1e-15)
    both = mp_cat(a, b, t)
    scale = math.sqrt(40) / root
    assert torch.allclose(both[:, :30], a * scale * (1 - t) / math.sqrt(30), rtol=1e-12, atol=0)
    assert torch.allclose(both[:, 30:], b * scale * t / math.sqrt(10), rtol=1e-12, atol=0)
    large_a, large_b = double(400, 300), double(400, 100)
    assert rms(mp_cat(large_a, large_b, t)) == pytest.approx(1.0, abs=0.01)
    assert rms(mp_sum(large_a[:, :100], large_b, t)) == pytest.approx(1.0, abs=0.02)
    shares = mp_cat(large_a, large_b, t).square()
    assert (shares[:, 300:].sum() / shares.sum()).item() == pytest.approx(t**2 / root**2, abs=0.01)


def test_fourier_features_are_those_of_the_paper() -> None:
    layer = MPFourier(16).double()
    a = double(7)
    expected = torch.stack(
        [
            math.sqrt(2) * torch.cos(2 * math.pi * (f * a + p))
            for f, p in zip(layer.frequencies, layer.phases, strict=True)
        ],
        1,
    )
    assert torch.allclose(layer(a), expected, rtol=1e-12, atol=1e-12)
    assert rms(MPFourier(5000)(torch.linspace(-1.5, 1.1, 20))) == pytest.approx(1.0, abs=0.02)
    assert not list(layer.parameters())


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_weight_acts_with_magnitude_one_over_the_root_of_its_inputs(kernel: int | None) -> None:
    layer = MPLinear(20, 30) if kernel is None else MPConv(20, 30, kernel)
    layer = layer.double()
    layer.weight.data = double(*layer.weight.shape) * torch.rand(30, *[1] * (layer.weight.dim() - 1)) * 9
    x = double(8, 20) if kernel is None else double(8, 20, 6, 6)
    flat = layer.weight.detach().flatten(1)
    fan_in = flat.shape[1]
    unit = flat / (1e-4 + flat.norm(dim=1, keepdim=True) / math.sqrt(fan_in))
    effective = (2.5 / math.sqrt(fan_in) * unit).view_as(layer.weight)
    expected = x @ effective.T if kernel is None else F.conv2d(x, effective, padding=kernel // 2)
    assert torch.allclose(layer(x, 2.5), expected, rtol=1e-12, atol=1e-12)
    interior = layer(x) if kernel is None else layer(x)[:, :, 1:-1, 1:-1]
    assert rms(interior) == pytest.approx(1.0, abs=0.1)


def test_gradient_is_orthogonal_to_the_weight_and_so_makes_it_longer() -> None:
    layer = MPConv(6, 5, 3).double()
    layer.weight.data *= 3
    layer(double(4, 6, 8, 8)).square().mul(double(4, 5, 8, 8)).sum().backward()
    dots = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    assert (dots.abs() < 1e-3 * layer.weight.grad.flatten(1).norm(dim=1)).all()  # but for eps


def test_forced_normalisation_leaves_the_function_as_it_is(network: EDM2UNet) -> None:
    arguments = inputs()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, MPWeight):
                part.weight.mul_(1 + 3 * torch.rand(len(part.weight), *[1] * (part.weight.dim() - 1)))
        before = network(*arguments)
        assert max(rms(part.weight) for part in network.modules() if isinstance(part, MPWeight)) > 1.5
        normalize_weights(network)
        after = network(*arguments)
    for part in network.modules():
        if isinstance(part, MPWeight):
            assert torch.allclose(part.weight.square().flatten(1).mean(1), torch.ones(len(part.weight)), atol=1e-3)
    assert torch.allclose(before, after, atol=2e-3 * rms(before))


def test_attention_is_softmax_of_cosine_similarity() -> None:
    layer = CosineAttention(8, heads=2).double()
    x = double(2, 8, 3, 3)
    qkv = layer.qkv(x).flatten(2)  # [2, 24, 9]
    found = torch.zeros(2, 8, 9, dtype=torch.float64)
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (part[:, rows] / (1e-4 + part[:, rows].norm(dim=1, keepdim=True) / 2) for part in qkv.chunk(3, 1))
        scores = q.transpose(1, 2) @ k / 2
        assert scores.abs().max() <= 2 + 1e-9
        found[:, rows] = v @ scores.softmax(-1).transpose(1, 2)
    expected = mp_sum(x, layer.out(found.view(2, 8, 3, 3)), 0.3)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_size_is_that_of_the_paper() -> None:
    """280.2 million for S on 64 × 64 latents with 1,000 classes; ours has one class more, for none given."""
    with torch.device("meta"):
        small = EDM2UNet((4, 64, 64), (192, 384, 576, 768), labels=1000)
    assert sum(parameter.numel() for parameter in small.parameters()) == pytest.approx(280.2e6, rel=2e-4)


def layer_magnitudes(network: nn.Module, *arguments: Tensor) -> dict[str, float]:
    """RMS of the output of every layer and block, by name."""
    found: dict[str, float] = {}

    def recording(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.update({name: rms(output)})

    parts = [(name, part) for name, part in network.named_modules() if name and not isinstance(part, nn.ModuleList)]
    hooks = [part.register_forward_hook(recording(name)) for name, part in parts]
    with torch.no_grad():
        network(*arguments)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("log_sigma", [-4.0, -1.0, 3.0])
@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_magnitudes_are_near_one_at_the_start(log_sigma: float, gain: float) -> None:
    """On images, at low, middle and high noise; the zeros around maps of 4 × 4 cost a 3 × 3 convolution a sixth."""
    network = EDM2UNet((1, 8, 8), (32, 48), layers_per_block=2, attention_resolutions=(4,), head_channels=16)
    if gain:
        open_gains(network)
    x0 = normalised(digits().train[:64])
    sigma = math.exp(log_sigma)
    noisy = (x0 + sigma * torch.randn_like(x0)) / math.hypot(sigma, SIGMA_DATA)
    found = layer_magnitudes(network, noisy, torch.full((64,), log_sigma / 4))
    gained = {name: found.pop(name) for name in list(found) if name.endswith("modulation") or name == "last"}
    assert all(0.6 * gain <= value <= 1.5 * gain for value in gained.values())
    assert min(found.values()) > 0.5
    assert max(found.values()) < 1.35
    assert statistics.median(found.values()) == pytest.approx(0.9, abs=0.15)


def test_every_parameter_gets_a_gradient(network: EDM2UNet) -> None:
    network(*inputs()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        rows = parameter.grad.flatten(1) if parameter.dim() else parameter.grad.view(1, 1)
        assert (rows.abs().amax(1) > 0).all(), name


def test_denoiser_starts_from_the_scaled_input_and_learns_its_gain_first() -> None:
    denoiser = Denoiser(EDM2UNet((1, 8, 8), (8, 16), layers_per_block=1), sigma_data=0.5)
    noisy, sigma = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1
    estimate = denoiser(noisy, sigma)
    c_skip = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1)
    assert torch.allclose(estimate, c_skip * noisy)
    (estimate - 1).square().sum().backward()
    moving = {name for name, p in denoiser.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"last_gain"}


def test_class_and_noise_level_change_the_output(network: EDM2UNet) -> None:
    noisy, c_noise, _ = inputs()
    one = network(noisy, c_noise, torch.full((6,), 1))
    assert not torch.allclose(one, network(noisy, c_noise, torch.full((6,), 2)), atol=1e-3)
    assert not torch.allclose(one, network(noisy, c_noise, torch.full((6,), 5)), atol=1e-3)  # none given
    assert not torch.allclose(one, network(noisy, c_noise + 0.2, torch.full((6,), 1)), atol=1e-3)
    with pytest.raises(ValueError, match=r"labels is None, expected \[B\] of 0 to 5"):
        network(noisy, c_noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inside_and_full_outside(network: EDM2UNet, dtype: torch.dtype) -> None:
    seen: dict[str, torch.dtype] = {}
    for name, part in network.named_modules():
        if name.count(".") == 1 or isinstance(part, MPConv):
            part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    noisy, c_noise, labels = inputs()
    full = network(noisy, c_noise, labels)
    with torch.autocast("cpu", dtype=dtype):
        output = network(noisy, c_noise, labels)
    assert output.dtype == torch.float32
    assert set(seen.values()) == {dtype}
    assert 1e-5 < rms(output - full) / rms(full) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_activations_are_clipped_where_float16_would_end() -> None:
    network = EDM2UNet((1, 8, 8), (8,), layers_per_block=1)
    found: list[float] = []
    network.middle[0].register_forward_hook(lambda module, args, output: found.append(output.abs().max().item()))
    network.middle[0](1e6 * torch.randn(2, 8, 8, 8), torch.zeros(2, 8))
    assert found == [256.0]


def test_dropout_acts_in_training_only() -> None:
    network = EDM2UNet((1, 8, 8), (8,), layers_per_block=1, dropout=0.5)
    open_gains(network)
    arguments = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert not torch.equal(network(*arguments), network(*arguments))
    network.eval()
    assert torch.equal(network(*arguments), network(*arguments))


def test_compiles_without_a_graph_break() -> None:
    network = EDM2UNet((3, 8, 8), (8,), layers_per_block=1, labels=5)
    open_gains(network)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    arguments = inputs()
    eager, output = network(*arguments), compiled(*arguments)
    assert torch.allclose(output, eager, atol=1e-5)
    gradients = [torch.autograd.grad(value.square().sum(), list(network.parameters())) for value in (eager, output)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (1, 6, 6), "channels": (8, 8, 8)}, "images of 6 × 6 cannot be halved 2 times"),
        ({"image_shape": (1, 8, 8), "channels": (50,), "head_channels": 16}, "channels has 50 with attention"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDM2UNet(**settings)
