"""Calls that look alike are checked once.

A training loop calls its criterion with tensors of the same dtypes, shapes and strides at each step. What follows from
these alone (that arguments and buffers are right, that kernels can read them as they are) is decided at the first such
call and kept in a `Plan`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import backends
from ._torch import comparison_with, observed, plain
from .operators import one_layout
from .problem import Inputs, Plan, Problem, State, check_state, make_inputs

_MOST = 64  # plans of one criterion; calls that need more come from data whose shapes are all different


class Plans:
    """The plans of a criterion. Copies of the criterion start without any."""

    __slots__ = ("_plans",)

    def __init__(self) -> None:
        self._plans: list[Plan] = []  # the one used last is the first

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()

    def inputs(self, problem: Problem, state: State, *arguments: Any) -> Inputs:
        """As `make_inputs` of the arguments, and `check_state`, but without their checks where there is a plan.

        The result has a plan unless each call must be looked at, because it passes the dispatcher or an argument is
        converted or copied before a kernel reads it.

        Raises:
            ValueError, TypeError, RuntimeError: as `make_inputs` and `check_state`.
        """
        prediction, target, log_snr, noise, coefficients, base_weight, sample_weight, reduction = arguments
        if observed():  # before anything is read that a compiler would guard
            return _checked_inputs(problem, state, arguments)
        kind: tuple[Any, ...] = problem, backends.variables.get(backends.KEY), reduction, coefficients is None
        tensors: tuple[Any, ...] = prediction, target, log_snr, *state
        terms: Any = (1.0, -1.0, 0.0)
        try:
            comparable = not (prediction.is_nested or target.is_nested or log_snr.is_nested)
            if not (noise is None and coefficients is None and base_weight is None and sample_weight is None):
                if coefficients is not None:
                    given = coefficients if isinstance(coefficients, (tuple, list)) else ()
                    terms = [float(each) if type(each) is int else each for each in given]
                others = noise, base_weight, sample_weight, *terms
                # Of a number only whether it is 0, as then its tensor is not read.
                kind += tuple(each != 0.0 if type(each) is float else type(each) for each in others)
                tensors += tuple(each for each in others if each is not None and type(each) is not float)
                comparable = comparable and not any(each.is_nested for each in tensors)
        except AttributeError:  # one is no tensor
            comparable = False
        if not comparable:  # torch ends the process when it compares a nested tensor
            return _checked_inputs(problem, state, arguments)
        for plan in self._plans:
            if plan.kind == kind and plan.fits(*tensors):
                break
        else:
            return self._with_plan(_checked_inputs(problem, state, arguments), problem, kind, tensors)
        if plan is not self._plans[0]:
            self._plans = [plan, *(each for each in self._plans if each is not plan)]
        a, b, c = terms
        return tuple.__new__(Inputs, (  # a quarter of the time of Inputs(...)
            prediction, target if plan.reads_target else None, noise if plan.reads_noise else None, a, b, c, log_snr,
            base_weight, sample_weight, None, plan.mean, plan,
        ))  # fmt: skip

    def _with_plan(self, inputs: Inputs, problem: Problem, kind: tuple[Any, ...], tensors: tuple[Any, ...]) -> Inputs:
        """The inputs of the first call that looks like this, with a plan if kernels read no copy of an argument."""
        read = (inputs.log_snr, inputs.base_weight, inputs.sample_weight, inputs.a, inputs.b, inputs.c)
        copied = any(isinstance(value, Tensor) and all(value is not each for each in tensors) for value in read)
        if copied or any(dense is not each for dense, each in zip(one_layout(inputs), inputs, strict=True)):
            return inputs
        fits = comparison_with(tensors) if plain(tensors) else None
        if fits is None or not fits(*tensors):
            return inputs
        kernels = backends.select(problem.backend, inputs.prediction)
        plan = Plan(kind, fits, inputs.target is not None, inputs.noise is not None, inputs.mean, kernels)
        self._plans = [plan, *self._plans[: _MOST - 1]]
        return inputs._replace(plan=plan)


def _checked_inputs(problem: Problem, state: State, arguments: tuple[Any, ...]) -> Inputs:
    inputs = make_inputs(*arguments)
    check_state(state, problem.bins, "prediction", inputs.prediction)
    return inputs


def with_weight(inputs: Inputs, weight: Tensor) -> Inputs:
    """The inputs with weights [B]; without a plan if kernels cannot read these as they are."""
    plan = inputs.plan if inputs.plan is not None and plain((weight,)) else None
    return inputs._replace(weight=weight, plan=plan)
