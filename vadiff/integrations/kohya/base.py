"""What the trainers' mixins have in common: a criterion of the class or of the command line, saved and logged."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

from ...loss import DiffusionLoss
from .arguments import criterion_for, given, option
from .saving import register


class Adaptive:
    """Base of the mixins. Attributes: see `AdaptiveLoss`."""

    criterion: DiffusionLoss
    log_every: int = 100
    fresh_statistics: bool = False
    _logged_at = 0  # optimiser step of the last record: the scripts log several times at a step
    _hook: ClassVar[str]  # the method of a trainer that a mixin extends

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError if the mixin's methods would not run: the trainer is listed first, or does not call them."""
        super().__init_subclass__(**kwargs)
        mixin = next((base for base in cls.__mro__ if "_hook" in vars(base)), None)
        if mixin is None:
            return
        for before in cls.__mro__[: cls.__mro__.index(mixin)]:
            if not issubclass(before, Adaptive) and hasattr(before, cls._hook):
                raise TypeError(
                    f"{cls.__name__} has {before.__name__} before {mixin.__name__}, which then does nothing. Use "
                    f"class {cls.__name__}({mixin.__name__}, {before.__name__})."
                )

        looped = next((base for base in cls.__mro__ if "train" in vars(base) and not issubclass(base, Adaptive)), None)
        code = None if looped is None else getattr(vars(looped)["train"], "__code__", None)
        if looped is not None and cls._hook not in vars(looped) and code is not None and "super" not in code.co_names:
            raise TypeError(
                f"{looped.__name__} has a training loop of its own, which does not call {cls._hook}: {mixin.__name__} "
                "would do nothing. Use the function vadiff.integrations.kohya.post_process_loss in that loop."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shared = getattr(type(self), "criterion", None)
        if "criterion" not in vars(self) and isinstance(shared, DiffusionLoss):
            self.criterion = copy.deepcopy(shared)

    def train(self, args: Any) -> Any:
        """Read the options of `add_arguments`, then train.

        Raises:
            ValueError: options of the criterion with a criterion in the class, or as `DiffusionLoss`; a learned
                weighting, which the trainer's optimizer does not train.
            TypeError: the class's criterion is not a `DiffusionLoss`.
        """
        self._read_options(args)
        result = super().train(args)  # type: ignore[misc]
        if not self.criterion.statistics.count.any():
            warnings.warn(
                f"{type(self).__name__} has recorded no loss: its training loop did not call {self._hook} with a loss "
                "that requires grad, so nothing was weighted",
                stacklevel=2,
            )
        return result

    def _read_options(self, args: Any) -> None:
        """Make the criterion where there is none, and take the other options that were given."""
        criterion = getattr(self, "criterion", None)
        name = type(self).__name__
        if criterion is None:
            self.criterion = criterion_for(args, *self._process_and_form(args))
        elif not isinstance(criterion, DiffusionLoss):
            raise TypeError(f"{name}.criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
        elif given(args):
            raise ValueError(
                f"{', '.join(given(args))} given with {name}.criterion, expected one of them: leave out `criterion = "
                "...` in the class to choose on the command line"
            )
        if any(True for _ in self.criterion.parameters()):
            raise ValueError(
                "criterion has parameters (a learned weighting), but the trainer's optimizer takes its network's only. "
                "Use weighting='loss_level', to which they converge."
            )
        every = option(args, "log_every")
        self.log_every = self.log_every if every is None else every
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every!r}, expected a positive integer")
        self.fresh_statistics = self.fresh_statistics or bool(option(args, "fresh_statistics"))

    def _process_and_form(self, args: Any) -> tuple[Any, str]:
        """Process and prediction type of `DiffusionLoss.for_process`."""
        raise NotImplementedError

    def _register(self, accelerator: Any) -> None:
        """Make the criterion part of the states, and say what it is."""
        register(accelerator, self.criterion, self.fresh_statistics)
        bins = self.criterion.statistics.bins
        accelerator.print(
            f"vadiff: {self.criterion.weighting}, {bins.size} bins of log-SNR from {bins.low:g} to {bins.high:g}"
        )

    def _statistics_at(self, step: int) -> dict[str, float]:
        """What to log at an optimiser step: the statistics once every `log_every` steps, else nothing."""
        logs: dict[str, float] = {}
        if step != self._logged_at and step % self.log_every == 0:
            self._logged_at = step
            self.criterion.log_to(lambda values, _: logs.update(values), step)
        return logs
