"""Gradient checkpointing of both networks: the same outputs and gradients, with less kept for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vadiff.models import EDM2UNet, unet

SHAPE, CHANNELS, CLASSES = (3, 8, 8), (8, 16), 5


def edm2(**options: Any) -> nn.Module:
    return EDM2UNet(SHAPE, CHANNELS, layers_per_block=1, labels=CLASSES, head_channels=8, **options)


def classic(**options: Any) -> nn.Module:
    pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    return unet(SHAPE, CHANNELS, attention_resolutions=(4,), labels=CLASSES, **options)


@pytest.fixture(params=[edm2, classic], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return request.param


def alike(make: Callable[..., nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network without and one with gradient checkpointing, of the same weights."""
    plain, checkpointed = make(**options), make(**options, gradient_checkpointing=True)
    with torch.no_grad():
        for parameter in plain.parameters():
            if not parameter.dim():  # EDM2's gains start at 0
                parameter.fill_(0.5)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, *SHAPE), torch.randn(4), torch.tensor([0, 1, 4, 5])


def output_and_gradients(network: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(3)  # of dropout
    output = network(*arguments)
    output.square().sum().backward()
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    return [output.detach(), *found]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_equal_to_the_bit(make: Callable[..., nn.Module], dropout: float) -> None:
    plain, checkpointed = alike(make, dropout=dropout)
    arguments = inputs()
    for one, other in zip(
        output_and_gradients(plain, arguments), output_and_gradients(checkpointed, arguments), strict=True
    ):
        assert torch.equal(one, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = output_and_gradients(plain, arguments), output_and_gradients(checkpointed, arguments)
    assert all(torch.equal(one, other) for one, other in zip(*low, strict=True))


def test_dropout_draws_the_next_numbers_after_the_backward_pass(make: Callable[..., nn.Module]) -> None:
    """Restoring the generator for the second computation must not rewind it for the step after."""
    plain, checkpointed = alike(make, dropout=0.3)
    drawn = []
    for network in (plain, checkpointed):
        torch.manual_seed(4)
        network(*inputs()).sum().backward()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_less_is_kept_for_the_backward_pass(make: Callable[..., nn.Module]) -> None:
    def bytes_kept(network: nn.Module) -> int:
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(*inputs())
            total = sum(kept.values())
        output.sum().backward()
        return total

    plain, checkpointed = alike(make)
    assert bytes_kept(checkpointed) < 0.5 * bytes_kept(plain)


def test_blocks_are_computed_twice_only_for_a_backward_pass(make: Callable[..., nn.Module]) -> None:
    calls = []
    network = make(gradient_checkpointing=True)
    for part in network.modules():
        if type(part).__name__ in ("_Block", "ResnetBlock2D"):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(*inputs())
        once = len(calls)
        network(*inputs())
    assert len(calls) == 2 * once
    network(*inputs()).sum().backward()
    assert 3 * once < len(calls) <= 4 * once  # diffusers keeps its first block in the middle


def test_copies_checkpoint_as_well(make: Callable[..., nn.Module]) -> None:
    plain, checkpointed = alike(make)
    arguments = inputs()
    copied = output_and_gradients(copy.deepcopy(checkpointed), arguments)
    for one, other in zip(output_and_gradients(plain, arguments), copied, strict=True):
        assert torch.equal(one, other)


def test_compiles_without_a_graph_break_with_dropout() -> None:
    _, network = alike(edm2, dropout=0.3)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    arguments = inputs()
    for one, other in zip(
        output_and_gradients(network, arguments), output_and_gradients(compiled, arguments), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
