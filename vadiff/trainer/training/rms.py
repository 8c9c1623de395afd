"""Root mean square of weights, their last update and activations, layer by layer: do they grow over training?

Source of the idea: EDM2 (arXiv 2312.02696), figure 3.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...models import Denoiser
from .batches import Batch


def weights_of_layers(denoiser: Denoiser) -> dict[str, Tensor]:
    """Copies of the weights of every layer that has some, by the layer's name."""
    return {name: weight.detach().clone() for name, (_, weight) in _layers(denoiser).items()}


@torch.no_grad()
def rms_per_layer(
    denoiser: Denoiser, batch: Batch, before: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """For every layer with weights: RMS of its weight, of the last change of that, and of its output on `batch`.

    One forward pass of the network as it is, outside of training: neither compiled nor in low precision.

    Args:
        denoiser: whose network is looked at.
        batch: what it is run on.
        before: `weights_of_layers` before the last step; None leaves the updates out.

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
        noisy = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.eps
        denoiser.network_output(noisy, batch.sigma, batch.labels)
    finally:
        for hook in hooks:
            hook.remove()
    found = {"weights": {name: _rms(weight) for name, (_, weight) in layers.items()}, "activations": activations}
    if before is not None:
        found["updates"] = {name: _rms(weight - before[name]) for name, (_, weight) in layers.items()}
    return {what: {name: value.item() for name, value in values.items()} for what, values in found.items()}


def _layers(denoiser: Denoiser) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Every layer that has a weight, with it."""
    named = ((name, module, getattr(module, "weight", None)) for name, module in denoiser.network.named_modules())
    return {name: (module, weight) for name, module, weight in named if isinstance(weight, nn.Parameter)}


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()
