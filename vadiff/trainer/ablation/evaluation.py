"""The table [evaluate] of an experiment's file: how the images of every run are compared with real ones.

[evaluate]                   # what `vadiff ablate --evaluate` does with each run that is done; these are the defaults
metrics = ["fid", "kid"]     # of fid, kid, isc, prc
features = "inception"       # or "digits"; the default for the data set digits is "digits"
layer = "2048"               # of the Inception network
images = 5000                # drawn from the same seeds for every run
first_seed = 0
repeats = 1                  # sets of images, each from seeds of its own: the metrics are means over them
# solver = "dpmpp_2m"        # as for `vadiff sample`, and so are spacing and steps; default: by the process of each run
# spacing = "edm"            # "statistics": by each run's own, as --steps-from statistics
# steps = 16
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RunError
from ...information import Profile
from ...models.parameterisation import sigma_range
from ...sampling.generation import SPACINGS, Generation, default_generation, with_options
from ...sampling.solvers import SOLVERS
from ...sampling.steps import RHO
from ..config import TrainConfig
from ..evaluation.fidelity import LAYERS, METRICS, check_metrics, features_for, result_name
from ..training.run import is_complete, open_run


@dataclass(frozen=True)
class Evaluation:
    """Metrics to measure, and the images to measure them on.

    Raises:
        ValueError: an invalid option.
    """

    metrics: tuple[str, ...] = ("fid", "kid")
    features: str | None = None  # chosen by the data set
    layer: str = "2048"
    images: int = 5000
    first_seed: int = 0
    repeats: int = 1
    solver: str | None = None
    spacing: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.metrics or set(self.metrics) - set(METRICS):
            raise ValueError(f"metrics is {list(self.metrics)}, expected some of {', '.join(METRICS)}")
        if self.layer not in LAYERS:
            raise ValueError(f"layer is {self.layer!r}, expected one of {', '.join(LAYERS)} in quotes")
        if self.features not in (None, "inception", "digits"):
            raise ValueError(f"features is {self.features!r}, expected one of inception, digits")
        for name, known in (("solver", list(SOLVERS)), ("spacing", list(SPACINGS))):
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)} in quotes")
        for name, least in (("images", 5), ("first_seed", 0), ("repeats", 1), ("steps", 2)):
            value = getattr(self, name)
            if (name, value) != ("steps", None) and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}, expected a whole number from {least}")

    @classmethod
    def from_table(cls, table: Any) -> "Evaluation":
        """Read the table [evaluate].

        Raises:
            ValueError: an unknown or invalid option.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(table, Mapping) or set(table) - set(names):
            raise ValueError(f"evaluate is {table!r}, expected only {', '.join(names)}")
        metrics = table.get("metrics", list(cls.metrics))
        if not isinstance(metrics, list):
            raise ValueError(f"metrics is {metrics!r}, expected a list of {', '.join(METRICS)}")
        return cls(**{**table, "metrics": tuple(metrics)})

    def features_of(self, dataset: str) -> str:
        """The features that runs on a data set are compared by.

        Raises:
            ValueError: metrics or layer do not go with them.
        """
        features = self.features or features_for(dataset)
        check_metrics(self.metrics, features, self.layer)
        return features

    def arguments(self, dataset: str) -> list[str]:
        """Arguments that follow `vadiff evaluate RUN`."""
        return [
            "--metrics", ",".join(self.metrics), "--features", self.features_of(dataset), "--layer", self.layer,
            "--images", str(self.images), "--first-seed", str(self.first_seed), "--repeats", str(self.repeats),
            "--no-held-out",
            *(["--solver", self.solver] if self.solver else []),
            *self._spacing_arguments(),
            *(["--steps", str(self.steps)] if self.steps else []),
        ]  # fmt: skip

    def _spacing_arguments(self) -> list[str]:
        if self.spacing is None:
            return []
        return ["--steps-from" if self.spacing == "statistics" else "--spacing", self.spacing]

    def generation(
        self, process: str, sigmas: tuple[float, float] = (0.0, math.inf), profile: Profile | None = None
    ) -> Generation:
        """What `arguments` make of a run with that process, whose noise levels have the range `sigmas`.

        profile: of the run, for spacing "statistics".
        """
        chosen = default_generation(process, self.solver, self.spacing, sigmas=sigmas, profile=profile)
        return with_options(chosen, steps=self.steps)

    def was_done(self, run: Path, config: TrainConfig, step: int, network: str, reference: str) -> bool:
        """Whether `vadiff evaluate` has measured exactly this on a run.

        Args:
            run: its folder.
            config: of the run.
            step: of the checkpoint.
            network: key of the network that images are compared by, see `FeatureNetwork`.
            reference: `content_key` of the real images.
        """
        found = drawn_with(run, step)
        if found is None:
            return False
        features = self.features_of(config.dataset)
        try:
            profile = None
            if self.spacing == "statistics":
                profile = open_run(run).profile(step).bounded(config.sigma_data)
        except ValueError:  # no statistics to draw by: `vadiff evaluate` says so
            return False
        generation = self.generation(config.process, sigma_range(config.form()), profile)
        wanted: dict[str, Any] = {
            "features": features,
            "images": self.images,
            "first_seed": self.first_seed,
            "repeats": self.repeats,
            "seeds": None,  # consecutive
            "reference_sha256": reference,
        } | {f"generation.{name}": value for name, value in generation.recorded().items()}
        inception = features == "inception"
        wanted |= {"layer": self.layer, "inception_weights": network} if inception else {"digits_classifier": network}
        measured = json.loads(_file(run, step).read_text())["metrics"]
        needed = [name for name in self.metrics if name != "isc"]  # isc: not every weights file can give it
        names = {result_name(name, features, self.layer) for name in needed}
        return names <= set(measured) and all(found.get(name) == value for name, value in wanted.items())


def drawn_with(run: Path, step: int) -> dict[str, Any] | None:
    """Options with which `vadiff evaluate` measured a step of a run, by name; None if it did not, or not yet all of it.

    Raises:
        RunError: the file is damaged.
    """
    file = _file(run, step)
    if not file.exists():
        return None
    try:
        content = {"features": "inception", "repeats": 1, **json.loads(file.read_text())}  # of files without
        if not is_complete(content):
            return None
        options = _as_now(content.pop("generation", {}))
        generation = {f"generation.{name}": value for name, value in options.items()}
        return {
            name: value
            for name, value in (content | generation).items()
            if name not in ("step", "images_seen", "metrics", "means_over", "each")
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{file} cannot be read: {error}. Evaluate that step again") from error


def _as_now(generation: dict[str, Any]) -> dict[str, Any]:
    """The options of a `generation` that version 0.1 wrote, as `Generation.recorded` has them now."""
    if "sampler" not in generation:
        return generation
    euler = generation["sampler"] == "euler"  # on evenly spaced times, without a lowest level
    now = {name: value for name, value in generation.items() if name != "sampler"}
    now |= {"solver": generation["sampler"], "spacing": "flow" if euler else "edm", "clip": False, "guide": None}
    now |= {"sigma_min": None, "rho": None} if euler else {"rho": RHO}
    return now | {"label": "cycle" if generation.get("label") is None else generation["label"]}


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Name of the first option in which two evaluations differ, or None. The solver comes first: others follow it."""
    names = sorted({*one, *other}, key=lambda name: (name != "generation.solver", name))
    return next((name for name in names if one.get(name) != other.get(name)), None)


def _file(run: Path, step: int) -> Path:
    return run / "evaluation" / f"step-{step}" / "metrics.json"
