"""Loss objects for NVlabs' EDM and EDM2 training loops, from the papers' formulas.

Both loops make their loss object from a class name and options, call it as ``loss_fn(net=…, images=…, labels=…)``, and
run ``.sum().mul(loss_scaling / batch_gpu_total).backward()`` on the [B, C, H, W] tensor that comes back. Use one of
these class names instead, or create the object in the loop.

State. EDM2 keeps the `state_dict` of its loss object in every checkpoint and loads it on resume; its `torch.load`
needs ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` from torch 2.6 on, whatever the loss. EDM pickles the loss object into each
network snapshot but makes a new one on resume: load the state from the snapshot,
``loss_fn.restore(snapshot["loss_fn"])``. A run begun with the loops' own loss has no statistics: continue it with
``fresh_statistics=True``. Snapshots of both contain the loss object, so that loading one needs vadiff installed.
Statistics are merged over ranks and bit-identical on all of them, which EDM checks for every module that it saves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._ranks import number_of_ranks
from .._validation import require_number
from ..log_snr import from_sigma
from ..loss import DiffusionLoss
from ..process import loss_ratio
from ..targets import PosteriorMean, Recorded
from ..targets.references import Bank
from ..weighting import Constant
from .form import criterion_in_form, moved_beside, training_target

__all__ = ["EDM2Loss", "EDMLoss"]


class EDMLoss(nn.Module):
    """EDM's objective E[lambda(sigma)·|D(y + sigma·eps; sigma) - y|²] with weights and statistics per noise level.

    ln(sigma) ~ N(P_mean, P_std²) and lambda = 1/sigma² + 1/sigma_data² (Karras et al., arXiv 2206.00364, table 1 and
    section 5); lambda is the base weight, so the bins hold lambda times the squared error of D, which is the squared
    error of the raw network output F. Random numbers are drawn in the order sigma, augmentation, eps.

    Args:
        P_mean, P_std: of ln(sigma).
        sigma_data: standard deviation of the data.
        criterion: a `vadiff.DiffusionLoss`, or the name of a weighting for one with the default settings. "constant" is
            EDM's own loss. Not "learned", as the loops optimise the network only.
        target: regress D on the posterior mean in place of y, in training mode; becomes `criterion.target`. With the
            classes of its reference if the network gets labels. Pickles (snapshots) do not hold its references.
        options: of the named weighting and of `vadiff.DiffusionLoss`, such as ``strength=0.5, bins=64,
            fresh_statistics=True``. All of them, like the name, can be written in JSON, as the loops write theirs.

    Raises:
        ValueError, TypeError: an argument out of bounds, or a criterion with fixed weights for another loss than "edm".
    """

    def __init__(
        self,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_data: float = 0.5,
        criterion: DiffusionLoss | str = "variance_aware",
        target: PosteriorMean | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.P_mean = require_number("P_mean", P_mean)
        self.P_std = require_number("P_std", P_std, above=0.0)
        self.sigma_data = require_number("sigma_data", sigma_data, above=0.0)
        self.criterion = criterion_in_form(
            criterion, "edm", sigma_data=self.sigma_data, target=target, options=options,
            optimised="net.parameters()",
        )  # fmt: skip

    _labels_seen = False  # whether a call with a target has looked at the labels

    def forward(
        self,
        net: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            net: the denoiser D, called with noisy images [B, ...], sigma [B, 1, ...] and labels, and with
                `augment_labels` where there is an `augment_pipe`.
            images: clean images, [B, C, H, W] or of any shape with the batch in front.
            labels: passed to `net`.
            augment_pipe: images → (augmented images, augment labels).

        Returns:
            float32 of the images' shape: the loss w·lambda·mean((D - y)²) of each sample, expanded over its elements,
            so that sum and mean, and their gradients, are those of the weighted element-wise loss.

        Raises:
            ValueError: an `augment_pipe` with a target; labels of another kind than the target's reference has.
        """
        sigma = self._sigma(images)
        conditions = {}
        if augment_pipe is not None:
            if training_target(self.criterion) is not None:
                raise ValueError(
                    "augment_pipe is given with a target, expected None: the network is told how each image was "
                    "augmented, so that no two images share a posterior. Train with --augment=0, or without a target"
                )
            images, conditions["augment_labels"] = augment_pipe(images)
        noisy = images + torch.randn_like(images) * sigma
        denoised = net(noisy, sigma, labels, **conditions)
        return _spread(self._weighted(denoised, self._target(images, noisy, sigma, labels), sigma), images)

    def restore(self, saved: object) -> None:
        """Load the state of the loss object in one of EDM's network snapshots, ``snapshot["loss_fn"]``.

        Args:
            saved: an `EDMLoss` or `EDM2Loss`; another object has no statistics, which `fresh_statistics` allows.

        Raises:
            RuntimeError: it has no statistics, or some that do not fit.
        """
        self.load_state_dict(saved.state_dict() if isinstance(saved, nn.Module) else {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
        """EDM2 saves the attributes of its own loss, P_mean among them, as the state: that of no module here."""
        for name in ("P_mean", "P_std", "sigma_data"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *given)

    def _target(self, images: Tensor, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """What D is regressed on: the images, or their posterior mean."""
        target = training_target(self.criterion)
        if target is None:
            return images
        moved_beside(self.criterion, images)
        first = not self._labels_seen
        self._labels_seen = True
        x0_hat: Tensor = target(images, noisy, 1.0, sigma.flatten(), labels=_classes(labels, first or images.is_cpu))
        return x0_hat

    def _sigma(self, images: Tensor) -> Tensor:
        """Noise levels of a batch, [B, 1, ...] float32."""
        normal = torch.randn([images.shape[0]] + [1] * (images.dim() - 1), device=images.device)
        return (self.P_mean + self.P_std * normal).exp()

    def _weighted(self, denoised: Tensor, images: Tensor, sigma: Tensor) -> Tensor:
        """w·lambda·mean((D - y)²), [B]."""
        log_snr = from_sigma(sigma.flatten().double())  # float64: lambda is exact to float32
        base_weight = loss_ratio("edm", log_snr, sigma_data=self.sigma_data)
        criterion = moved_beside(self.criterion, denoised)
        loss: Tensor = criterion(denoised, images, log_snr, base_weight=base_weight, reduction="none")
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """State without references, which are a data set: both loops pickle the loss into every snapshot."""
        return {**self.__dict__, "_modules": {**self._modules, "criterion": _without_references(self.criterion)}}

    def extra_repr(self) -> str:
        return f"P_mean={self.P_mean:g}, P_std={self.P_std:g}, sigma_data={self.sigma_data:g}"


class EDM2Loss(EDMLoss):
    """`EDMLoss` for EDM2's networks, which have a head for the uncertainty u(sigma).

    EDM2's own loss is lambda/e**u·|D - y|² + u, with u trained jointly (Karras et al., arXiv 2312.02696, equations 13
    to 21): it divides each noise level by its mean loss and so cancels any other weight. Therefore either the head
    weights or the criterion. If the criterion does, the head's gradient is zero, not None, as DDP requires.

    Args:
        P_mean, P_std, sigma_data: as for `EDMLoss`; these defaults are for ImageNet-512 latents.
        criterion, target, options: as for `EDMLoss`.
        uncertainty: whether the head weights. None: if the criterion's weighting is "constant", which is EDM2's own
            loss with statistics of lambda·|D - y|².

    Raises:
        ValueError, TypeError: as `EDMLoss`; or both head and criterion would weight.
    """

    def __init__(
        self,
        P_mean: float = -0.4,
        P_std: float = 1.0,
        sigma_data: float = 0.5,
        criterion: DiffusionLoss | str = "variance_aware",
        uncertainty: bool | None = None,
        target: PosteriorMean | None = None,
        **options: Any,
    ) -> None:
        super().__init__(P_mean, P_std, sigma_data, criterion, target, **options)
        constant = isinstance(self.criterion.weighting, Constant)
        if uncertainty and not constant:
            raise ValueError(
                f"uncertainty is True with {self.criterion.weighting}, expected False: the head would learn to divide "
                "by the weighted loss and so undo the weighting. Use criterion='constant' to let the head weigh."
            )
        self.uncertainty = constant if uncertainty is None else bool(uncertainty)

    def forward(  # type: ignore[override]
        self,
        net: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            net: called with noisy images, sigma [B, 1, 1, 1], labels and ``return_logvar=True``; returns D and u, one
                number per sample.
            images, labels: as for `EDMLoss`.

        Returns:
            As `EDMLoss`; if the head weights, the loss includes u and may be negative.

        Raises:
            TypeError: net has no head for u.
            ValueError: u is not one number per sample; or as `EDMLoss`.
        """
        sigma = self._sigma(images)
        noisy = images + torch.randn_like(images) * sigma
        denoised, logvar = _with_logvar(net, noisy, sigma, labels)
        u = logvar.flatten().float()
        if u.shape != images.shape[:1]:
            raise ValueError(
                f"net returned a logvar of shape {tuple(logvar.shape)}, expected one number per sample: "
                f"({images.shape[0]}, 1, 1, 1)"
            )
        loss = self._weighted(denoised, self._target(images, noisy, sigma, labels), sigma)
        loss = loss * (-u).exp() + u if self.uncertainty else loss + 0.0 * u
        return _spread(loss, images)

    def __getstate__(self) -> dict[str, Any]:
        """State with the criterion on the CPU: EDM2 pickles its loss into snapshots that any machine may load."""
        on_cpu = copy.deepcopy(_without_references(self.criterion)).cpu()
        return {**self.__dict__, "_modules": {**self._modules, "criterion": on_cpu}}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, uncertainty={self.uncertainty}"


def _classes(labels: Tensor | None, check: bool) -> Tensor | None:
    """Classes [B] of EDM's labels, one-hot [B, C]; None for unconditional data, whose labels are [B, 0].

    check: whether to look if they are one-hot, for which the host waits for a GPU.
    """
    if labels is None or labels.numel() == 0:
        return None
    one_hot = labels.dim() == 2
    if one_hot and check:
        one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all())
    if not one_hot:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected (B, C), one-hot: a target needs classes. Texts and "
            "other conditions are different for each sample, so that no two share a posterior"
        )
    return labels.argmax(1)


def _without_references(criterion: DiffusionLoss) -> DiffusionLoss:
    """The criterion, or a view of it whose target is only what it recorded.

    EDM checks that all ranks save the same: without a target where each has recorded its own draws or kept a bank.
    """
    target = criterion.target
    if not isinstance(target, PosteriorMean):
        return criterion
    recorded = Recorded(target.description)
    recorded.removed = target.removed
    differs = isinstance(target.source, Bank) or not target.removed.sync
    view = copy.copy(criterion)  # which shares its modules
    view._modules = {**criterion._modules, "target": None if differs and number_of_ranks() > 1 else recorded}
    return view


def _with_logvar(
    net: Callable[..., tuple[Tensor, Tensor]], noisy: Tensor, sigma: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """D and u; raises TypeError if the network has no head for u."""
    expected = (
        "expected (denoised, logvar) from net(..., return_logvar=True). Use EDMLoss for a network without the head."
    )
    try:
        found = net(noisy, sigma, labels, return_logvar=True)
    except TypeError as error:
        if "return_logvar" not in str(error):
            raise
        raise TypeError(f"net returned no logvar, as it takes no return_logvar, {expected}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[1], Tensor):
        raise TypeError(f"net returned no logvar but {_described(found)}, {expected}")
    denoised, logvar = found
    return denoised, logvar


def _described(returned: object) -> str:
    if isinstance(returned, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in returned)})"
    return f"a {type(returned).__name__}"


def _spread(loss: Tensor, images: Tensor) -> Tensor:
    """[B] expanded to the images' shape: every element gets its sample's loss."""
    return loss.view([-1] + [1] * (images.dim() - 1)).expand_as(images)
