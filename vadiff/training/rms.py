"""Root mean square of weights and activations, layer by layer: do they grow or drift over training?

Source of the idea: EDM2 (arXiv 2312.02696), figure 3.
"""

import torch
from torch import Tensor, nn

from ..models import Denoiser
from .batches import Batch


@torch.no_grad()
def rms_per_layer(denoiser: Denoiser, batch: Batch) -> dict[str, dict[str, float]]:
    """For every layer with weights: RMS of its weight and of its output on `batch`, both by the layer's name.

    One forward pass of the network as it is, outside of training: neither compiled nor in low precision.
    """
    layers = {
        name: module
        for name, module in denoiser.network.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    activations: dict[str, Tensor] = {}

    def recording(name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, inputs: object, output: Tensor) -> None:
            activations[name] = output.float().square().mean().sqrt()

        return record

    hooks = [module.register_forward_hook(recording(name)) for name, module in layers.items()]
    try:
        noisy = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.eps
        denoiser.network_output(noisy, batch.sigma, batch.labels)
    finally:
        for hook in hooks:
            hook.remove()
    weights = {name: module.weight.float().square().mean().sqrt() for name, module in layers.items()}
    return {
        "weights": {name: value.item() for name, value in weights.items()},
        "activations": {name: value.item() for name, value in activations.items()},
    }
