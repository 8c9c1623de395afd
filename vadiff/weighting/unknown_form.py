"""A weighting given by name whose formula depends on the form of the loss, before the form is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops.problem import Coefficient
from ..process import PREDICTION_TYPES, form_of
from .base import Weighting


class UnknownForm(Weighting):
    """A name such as "min_snr", until a call or a trainer says which form the loss has.

    A `DiffusionLoss` replaces it at the first call with `coefficients`, an integration by its trainer's form. Any other
    call raises ValueError with the line to write.

    Args:
        name: of the weighting, as in `vadiff.weighting.available()`.
        make: makes the weighting of that name, with `prediction_type=` and `sigma_data=`.
    """

    def __init__(self, name: str, make: Callable[..., Weighting]) -> None:
        self.name = name
        self._make = make

    def in_form(self, prediction_type: str | None, sigma_data: float = 0.5) -> Weighting:
        """The weighting for this form of the loss.

        Raises:
            ValueError: prediction_type is None, the form is not known, or is none of the prediction types.
        """
        if prediction_type is None:
            self._refuse()
        return self._make(prediction_type=prediction_type, sigma_data=sigma_data)

    def for_call(self, criterion: Any, coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> Weighting:
        """The weighting for the form that these coefficients show. In eager mode the criterion keeps it."""
        weighting = self.in_form(form_of(coefficients))
        if not torch.compiler.is_compiling():
            criterion.weighting = weighting
        return weighting

    def for_batch(self, log_snr: Tensor, sync: bool) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"weighting is {self.name!r}, whose formula depends on the form of the loss, and nothing says which form "
            f"this loss has: one of {', '.join(PREDICTION_TYPES)}. Make the criterion by "
            f'vadiff.DiffusionLoss(vadiff.weighting.from_name({self.name!r}, prediction_type="epsilon")), or by '
            f"vadiff.DiffusionLoss.for_process(scheduler, weighting={self.name!r}); or pass "
            "coefficients= with the call."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownForm) and other.name == self.name

    def __hash__(self) -> int:
        return hash((UnknownForm, self.name))

    def __repr__(self) -> str:
        return f"{self.name} of a form not known yet"
