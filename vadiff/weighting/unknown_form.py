"""A weighting given by name whose formula depends on the form of the loss, which the calls have to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops.problem import Bins, Coefficient
from ..process import PREDICTION_TYPES, EDMTerms, form_of
from .base import Weighting

_NEED_SIGMA_DATA = ("edm", "monotonic_edm", "soft_min_snr")


class UnknownForm(Weighting):
    """A name such as "min_snr", the form of whose loss is that of the first call with `coefficients`.

    An integration replaces it by a weighting in its trainer's form. Before the form is known, weights are NaN and a
    call that does not show it raises ValueError with the line to write; afterwards this object has the attributes of
    the weighting of that name. sigma_data is 0.5, as by default.

    Args:
        name: of the weighting, as in `vadiff.weighting.available()`.
        make: makes the weighting of that name, with `prediction_type=` and `sigma_data=`.

    Attributes:
        form: one of `vadiff.process.PREDICTION_TYPES`, that of the calls; None before the first.
    """

    form: str | None = None

    def __init__(self, name: str, make: Callable[..., Weighting]) -> None:
        self.name = name
        self._make = make
        self._made: Weighting | None = None  # in the form of the calls, cached

    def in_form(self, prediction_type: str, sigma_data: float = 0.5) -> Weighting:
        """The weighting for a loss of this form.

        Raises:
            ValueError: not a prediction type, or another form than that of earlier calls.
        """
        if self.form is not None:
            self._require_same(prediction_type)
        return self._make(prediction_type=prediction_type, sigma_data=sigma_data)

    def for_call(self, criterion: Any, coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> Weighting:
        """The weighting for the form that these coefficients show, which is kept.

        Raises:
            ValueError: they do not show a form; in eager mode also another one than that of earlier calls.
        """
        form = form_of(coefficients)
        if form is None:
            self._refuse()
        if torch.compiler.is_compiling():
            self._require_sigma_data(coefficients)
            self.form = form  # without reading it, which would be a guard and compile the second call anew
            return self._make(prediction_type=form)
        if self.form is None:
            self._require_sigma_data(coefficients)
            self.form = form
        self._require_same(form)
        return self._known()

    @property
    def pointwise(self) -> bool:
        return self._known().pointwise

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor | None:
        return self._known().for_batch(log_snr, sync)

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        if self.form is None:
            return super().weight_at(log_snr, log_weights, bins)
        return self._known().weight_at(log_snr, log_weights, bins)

    def _known(self) -> Weighting:
        """The weighting in the form of the calls."""
        if self.form is None:
            self._refuse()
        if torch.compiler.is_compiling():
            return self._make(prediction_type=self.form)
        if self._made is None:
            self._made = self._make(prediction_type=self.form)
        return self._made

    def _require_same(self, form: str) -> None:
        if form != self.form:
            raise ValueError(
                f"weighting is {self.name!r}, which the criterion's calls so far have used in the form {self.form!r}, "
                f"and this one is in the form {form!r}. Use one criterion for each form of the loss."
            )

    def _require_sigma_data(self, coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> None:
        if self.name in _NEED_SIGMA_DATA and isinstance(coefficients, EDMTerms):
            raise ValueError(
                f"weighting is {self.name!r}, whose formula contains the standard deviation of the data, which the "
                "coefficients of an EDM network do not show. Make the criterion by vadiff.DiffusionLoss("
                f'vadiff.weighting.from_name({self.name!r}, prediction_type="sample", sigma_data=...)).'
            )

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"weighting is {self.name!r}, whose formula depends on the form of the loss, and nothing says which form "
            f"this loss has: one of {', '.join(PREDICTION_TYPES)}. Make the criterion by "
            f'vadiff.DiffusionLoss(vadiff.weighting.from_name({self.name!r}, prediction_type="epsilon")), or by '
            f"vadiff.DiffusionLoss.for_process(scheduler, weighting={self.name!r}). A call of the criterion (not of "
            "reweight) may also show the form, by coefficients=vadiff.process.coefficients(...)."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.form is None:
            raise AttributeError(
                f"{name!r}: the weighting is {self.__dict__.get('name')!r} of a form not known yet, and has the "
                "attributes of that name's weighting after the first call that shows the form of the loss"
            )
        return getattr(self._known(), name)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UnknownForm):
            return (other.name, other.form) == (self.name, self.form)
        return self.form is not None and self._known() == other

    def __hash__(self) -> int:
        return hash((UnknownForm, self.name)) if self.form is None else hash(self._known())

    def __repr__(self) -> str:
        return f"{self.name} of a form not known yet" if self.form is None else repr(self._known())
