"""Calls that look alike are checked once.

A training loop calls its criterion with tensors of the same dtypes, shapes and strides at each step: calls with one
signature. What follows from the signature alone (that the arguments are right, that kernels can read them as they are)
is decided at the first such call and kept in a `Plan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._torch import PLAIN, observed, plain
from .operators import one_layout
from .problem import Inputs, Plan, make_inputs

_MOST = 64  # plans of one criterion; more signatures than these come from data whose shapes are all different


class Plans:
    """The plans of a criterion. Copies start without any."""

    __slots__ = ("_by_signature", "_last")

    def __init__(self) -> None:
        self._last: Plan | None = None
        self._by_signature: dict[tuple[Any, ...], Plan] = {}

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()

    def inputs(self, *arguments: Any) -> Inputs:
        """As `make_inputs` with the same arguments, but without its checks where there is a plan.

        The result has a plan unless each call must be looked at, because it passes the dispatcher or an argument is
        converted or copied before a kernel reads it.

        Raises:
            ValueError, TypeError: as `make_inputs`.
        """
        if observed():  # before anything is read that a compiler would guard
            return make_inputs(*arguments)
        prediction, target, log_snr, noise, coefficients, base_weight, sample_weight, reduction = arguments
        signature = (
            _of_tensor(prediction), _of_tensor(target), _of_tensor(log_snr), noise is not None and _of_tensor(noise),
            coefficients is not None and _of_coefficients(coefficients),
            base_weight is not None and _of_tensor(base_weight),
            sample_weight is not None and _of_tensor(sample_weight), reduction if type(reduction) is str else None,
        )  # fmt: skip
        plan = self._last
        if plan is None or plan.signature != signature:
            if None in signature:
                return make_inputs(*arguments)
            plan = self._by_signature.get(signature)
            if plan is None:
                return self._first_inputs(signature, arguments)
            self._last = plan
        terms: Any = (1.0, -1.0, 0.0)
        if coefficients is not None:
            terms = [each if isinstance(each, Tensor) else float(each) for each in coefficients]
        a, b, c = terms
        return tuple.__new__(Inputs, (  # a quarter of the time of Inputs(...)
            prediction, target if plan.reads_target else None, noise if plan.reads_noise else None, a, b, c, log_snr,
            base_weight, sample_weight, None, plan.mean, plan,
        ))  # fmt: skip

    def _first_inputs(self, signature: tuple[Any, ...], arguments: tuple[Any, ...]) -> Inputs:
        """The inputs of the first call with a signature, with a plan if kernels read no copy of an argument."""
        inputs = make_inputs(*arguments)
        given = (*arguments, *(arguments[4] or ()))
        read = (inputs.log_snr, inputs.base_weight, inputs.sample_weight, inputs.a, inputs.b, inputs.c)
        copied = any(isinstance(value, Tensor) and all(value is not each for each in given) for value in read)
        if copied or any(dense is not each for dense, each in zip(one_layout(inputs), inputs, strict=True)):
            return inputs
        if len(self._by_signature) == _MOST:
            self._by_signature.clear()
        plan = Plan(signature, inputs.target is not None, inputs.noise is not None, inputs.mean)
        self._last = self._by_signature[signature] = plan
        return inputs._replace(plan=plan)


def with_weight(inputs: Inputs, weight: Tensor) -> Inputs:
    """The inputs with weights [B]; without a plan if kernels cannot read these as they are."""
    plan = inputs.plan
    if plan is not None and not plain((weight,)):
        plan = None
    return inputs._replace(weight=weight, plan=plan)


def _of_tensor(value: Any) -> tuple[Any, ...] | None:
    """All that checks and kernels depend on but the data; None for a value that kernels cannot read as it is."""
    if type(value) not in PLAIN or value.layout is not torch.strided or value.data_ptr() == 0 or value.is_neg():
        return None
    layout = value.is_contiguous() or value.stride()
    return value.dtype, value.shape, layout, value.device, value.requires_grad


def _of_coefficients(values: Any) -> tuple[Any, ...] | None:
    """Of numbers only whether they are 0, as then a tensor is not read."""
    if type(values) not in (tuple, list):
        return None
    signature = tuple(each != 0.0 if type(each) in (float, int) else _of_tensor(each) for each in values)
    return None if None in signature else signature
