"""Root mean square (RMS) of weights, their last update and activations per layer, to see whether they grow.

Source of the idea: EDM2 (arXiv 2312.02696), figure 3.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...models import Denoiser
from .batches import Batch


def weights_of_layers(denoiser: Denoiser) -> dict[str, Tensor]:
    """Copies of the weights of every layer that has weights, by the layer's name."""
    return {name: weight.detach().clone() for name, (_, weight) in _layers(denoiser).items()}


@torch.no_grad()
def rms_per_layer(
    denoiser: Denoiser, batch: Batch, before: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """For every layer with weights: RMS of its weight, of the weight's last update, and of its output on `batch`.

    Runs one extra forward pass of the network, neither compiled nor in low precision.

    Args:
        denoiser: with the network to measure.
        batch: its input.
        before: `weights_of_layers` before the last step; None for no updates.

    Returns:
        "weights", "updates" and "activations", each by the layer's name.
    """
    layers = _layers(denoiser)
    activations: dict[str, Tensor] = {}

    def recording(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def record(module: nn.Module, inputs: object, output: Tensor) -> None:
            activations[name] = _rms(output)

        return record

    hooks = [layer.register_forward_hook(recording(name)) for name, (layer, _) in layers.items()]
    try:
        denoiser.training_output(batch.x0, batch.eps, batch.sigma, batch.labels, batch.augmentation)
    finally:
        for hook in hooks:
            hook.remove()
    found = {"weights": {name: _rms(weight) for name, (_, weight) in layers.items()}, "activations": activations}
    if before is not None:
        found["updates"] = {name: _rms(weight - before[name]) for name, (_, weight) in layers.items()}
    return {what: {name: value.item() for name, value in values.items()} for what, values in found.items()}


def _layers(denoiser: Denoiser) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Every layer that has a weight, with its weight."""
    named = ((name, module, getattr(module, "weight", None)) for name, module in denoiser.network.named_modules())
    return {name: (module, weight) for name, module, weight in named if isinstance(weight, nn.Parameter)}


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()
