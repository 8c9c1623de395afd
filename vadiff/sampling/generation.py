"""Generation of many images from a trained denoiser, on any number of devices."""

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._validation import require_known
from ..errors import RunError
from ..information import Profile
from ..models import Denoiser, Parameterisation
from ..models.parameterisation import VPForm, sigma_range
from ..process import DiscreteVP
from .devices import draw
from .per_seed import EVERY_SIGMA
from .solvers import SOLVERS
from .steps import FLOW_SIGMA_MAX, RHO, SIGMA_MAX, SIGMA_MIN, Churn, flow_levels, noise_levels, timestep_levels

DEFAULT_STEPS = {"heun": 18, "euler": 50, "ddpm": 50, "dpmpp_2m": 16}
LABELS = ("cycle", "random")
# The default sigma_min gives way to a process's lowest noise level if that is this many times as high, as for Stable
# Diffusion's betas: a network that is told more noise than there is removes signal. DDPM's 0.01 is near enough.
_FAR_ABOVE = 10.0
# Spacings of the noise levels: the function that makes them, and its options with their defaults.
SPACINGS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "edm": (noise_levels, {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": RHO}),
    "flow": (flow_levels, {"sigma_max": FLOW_SIGMA_MAX}),
    "timesteps": (timestep_levels, {}),
    "statistics": (noise_levels, {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}),
}


class Generated(NamedTuple):
    """A batch of images, in the order of its seeds."""

    start: int  # index of the first image among all seeds
    images: Tensor  # [B, C, H, W] uint8: pictures, see `TrainedModel.pictures`
    labels: Tensor | None  # [B] int64


class TrainedConfig(Protocol):
    """The fields of a training configuration that generation reads."""

    @property
    def process(self) -> str: ...  # "edm", "flow", ...

    @property
    def label_dropout(self) -> float: ...


class TrainedModel(Protocol):
    """A trained model to draw images from; the trainer's `Run` is one."""

    @property
    def config(self) -> TrainedConfig: ...

    def denoiser(self, weights: str, step: int | None, device: torch.device | str) -> Denoiser: ...

    def fingerprint(self, weights: str, step: int | None) -> tuple[int, str]:
        """The step that `denoiser` would read, and a text that is equal for equal weights only."""

    def pictures(self, x0: Tensor) -> Tensor:
        """Bytes [B, 1 or 3, H', W'] of what the denoiser draws, [B, C, H, W], both on the same device."""


@dataclass(frozen=True)
class Guide:
    """A weaker model that guides another one away from its own errors (autoguidance, arXiv 2406.02507).

    Args:
        name: names it in messages and files.
        run: the guide, with images of the same shape as the model it guides, and with the same classes or none.
        weights: as in `Generation`.
        step: as in `Generation`; None becomes the last that there is now.

    Attributes:
        fingerprint: of its weights, see `TrainedModel`: a guide that is trained on is another guide.
    """

    name: str
    run: TrainedModel
    weights: str = "ema"
    step: int | None = None
    fingerprint: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        step, fingerprint = self.run.fingerprint(self.weights, self.step)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "fingerprint", fingerprint)

    def recorded(self) -> dict[str, Any]:
        """Identifies this guide in a JSON file."""
        return {name: getattr(self, name) for name in ("name", "weights", "step", "fingerprint")}


@dataclass(frozen=True)
class Generation:
    """Options for drawing images.

    Args:
        solver: "heun" (2·steps - 1 network calls), "euler" (DDIM), "ddpm" (ancestral) or "dpmpp_2m"
            (DPM-Solver++(2M)), `steps` calls each; see `vadiff.sampling.solvers`. Guidance doubles the calls.
        steps: number of steps; None is 18 for "heun", 16 for "dpmpp_2m", else 50.
        spacing: of the noise levels: "edm" (`noise_levels`); "flow", evenly spaced times (`flow_levels`);
            "timesteps", those of the model's own discrete process (`timestep_levels`); or "statistics", by `profile`
            (`noise_levels` with a profile).
        sigma_min: lowest noise level before 0, spacings "edm" and "statistics"; None is 0.002.
        sigma_max: highest noise level, every spacing but "timesteps"; None is 80, with "flow" 1000.
        rho: spacing "edm": larger values put more of the steps at low noise; None is 7.
        profile: x0 errors of the model by noise level, spacing "statistics".
        churn: EDM's stochastic sampler ("heun"); None is deterministic.
        clip: clamp every estimate of x0 to [-1, 1].
        label: the class of every image, or for each image "cycle", its seed mod number of classes, or "random", drawn
            by its seed from all classes. For a conditional model.
        guidance: w of D_guide + w·(D - D_guide); 1 is no guidance.
        guided_sigma: (low, high), noise levels low < sigma <= high are guided (arXiv 2404.07724); all by default.
        guide: None guides by the model itself without a class.
        weights: "ema", "raw" or "ema-<width>", see `Run.denoiser`.
        step: of the checkpoint; None is the last.
        batch_size: images per batch on each device; does not affect the images.
        devices: devices to draw on; each draws its own batches.

    Raises:
        ValueError: an argument out of bounds, or one that the solver, the spacing or the guidance would not use.
    """

    solver: str = "heun"
    steps: int | None = None
    spacing: str = "edm"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    profile: Profile | None = None
    churn: Churn | None = None
    clip: bool = False
    label: int | str = "cycle"
    guidance: float = 1.0
    guided_sigma: tuple[float, float] = EVERY_SIGMA
    guide: Guide | None = None
    weights: str = "ema"
    step: int | None = None
    batch_size: int = 256
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("spacing", SPACINGS)):
            require_known(name, getattr(self, name), known)
        if self.solver != "heun" and self.churn is not None:
            raise ValueError(f"churn is for the solver heun, not for {self.solver}")
        if isinstance(self.label, str) and self.label not in LABELS:
            raise ValueError(f"label is {self.label!r}, expected a class or one of {', '.join(LABELS)}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}, expected a number")
        low, high = self.guided_sigma
        if not 0.0 <= low < high:
            raise ValueError(f"guided_sigma is {self.guided_sigma}, expected a lower and a higher noise level")
        if self.guided_sigma != EVERY_SIGMA and self.guidance == 1.0:
            raise ValueError(
                f"guided_sigma is {self.guided_sigma} with guidance 1, which leaves it unused: try guidance 2"
            )
        if self.guide is not None and self.guidance == 1.0:
            raise ValueError(f"guide is {self.guide.name} with guidance 1, which leaves it unused: try guidance 2")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if not self.devices:
            raise ValueError("devices is empty, expected at least one")
        defaults = SPACINGS[self.spacing][1] | {"steps": DEFAULT_STEPS[self.solver]}
        for name in ("steps", "sigma_min", "sigma_max", "rho"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                suitable = " or ".join(spacing for spacing, (_, options) in SPACINGS.items() if name in options)
                raise ValueError(f"{name} is for the spacing {suitable}, not for {self.spacing}")
        if (self.profile is None) == (self.spacing == "statistics"):
            given = "no profile" if self.profile is None else "a profile"
            raise ValueError(f"spacing is {self.spacing} with {given}: spacing statistics needs one, the others none")
        if self.spacing != "timesteps":  # whose levels depend on the model
            self._spaced()

    def levels(self, form: Parameterisation) -> Tensor:
        """The noise levels for a denoiser of this form, [steps + 1] float64, falling to 0.

        Raises:
            ValueError: more noise than its process has; or with spacing "timesteps" a process without timesteps, or
                too many steps.
        """
        process = form.process if isinstance(form, VPForm) else None
        if self.spacing == "timesteps":
            if not isinstance(process, DiscreteVP):
                raise ValueError("spacing is timesteps, expected edm or flow: the model has no discrete timesteps")
            return timestep_levels(process, self.steps or 0)
        highest = sigma_range(form)[1]
        if self.sigma_max is not None and self.sigma_max > highest:
            raise ValueError(
                f"sigma_max is {self.sigma_max:g}, expected at most {highest:.4g}, the highest noise level of the "
                f"model's process {process}"
            )
        return self._spaced()

    def _spaced(self) -> Tensor:
        make, defaults = SPACINGS[self.spacing]
        profile = {} if self.profile is None else {"profile": self.profile}
        return make(self.steps, **{name: getattr(self, name) for name in defaults}, **profile)

    def labels(self, seeds: Sequence[int], classes: int) -> Tensor | None:
        """The class of each seed, [len(seeds)] int64, or None for a model without classes.

        Raises:
            ValueError: a label out of range, or for a model without classes a label, or guidance without a guide.
        """
        if classes == 0:
            if self.label != "cycle":
                raise ValueError(f"label is {self.label}, but this model was trained without classes")
            if self.guidance != 1.0 and self.guide is None:
                raise ValueError(
                    f"guidance is {self.guidance}, but this model was trained without classes: it needs a guide"
                )
            return None
        if self.label == "cycle":
            return torch.tensor([seed % classes for seed in seeds], dtype=torch.int64)
        if self.label == "random":
            return torch.tensor([random_class(seed, classes) for seed in seeds], dtype=torch.int64)
        if not 0 <= int(self.label) < classes:
            raise ValueError(f"label is {self.label}, expected 0 to {classes - 1}: the model's classes")
        return torch.full((len(seeds),), int(self.label), dtype=torch.int64)

    def recorded(self) -> dict[str, Any]:
        """What the images depend on apart from their seeds and the checkpoint's step, for a JSON file."""
        left_out = ("batch_size", "devices", "step", "profile")
        fields = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        values = {name: getattr(self, name) for name in fields}
        values |= {
            "churn": None if self.churn is None else repr(self.churn),
            "guide": None if self.guide is None else self.guide.recorded(),
        }
        if self.guided_sigma == EVERY_SIGMA:
            del values["guided_sigma"]  # what was recorded before there was an interval stays equal
        else:
            values["guided_sigma"] = list(self.guided_sigma)
        if self.profile is not None:
            values["profile"] = _fingerprint(self.profile)
        return values


def _fingerprint(profile: Profile) -> str:
    """A text that differs between profiles, but not by the rounding of another machine."""
    numbers = [f"{value:.4g}" for value in (*profile.log_snr.tolist(), *profile.x0_error.tolist())]
    return hashlib.sha256(" ".join(numbers).encode()).hexdigest()[:16]


def random_class(seed: int, classes: int) -> int:
    """A class from 0 to classes - 1, uniform over seeds, and independent of the noise that the seed draws."""
    # Not from the noise's generator: its first numbers are the noise, and drawing from it would change the image.
    return int(random.Random(f"class of seed {seed}").random() * classes)


def generate(run: TrainedModel, seeds: Sequence[int], generation: Generation) -> Iterator[Generated]:
    """Draw one image per seed from a run.

    Args:
        run: what `vadiff.training.open_run` returned.
        seeds: one per image; its image does not depend on batch_size or devices.
        generation: solver, guidance, weights and devices.

    Yields:
        Batches in order of completion, which on several devices is not the order of seeds.

    Raises:
        ValueError: options that the model does not support, or a guide of another shape or with other classes.
        RunError: the denoiser returned non-finite values.
    """
    devices = list(dict.fromkeys(generation.devices))
    denoisers = {device: run.denoiser(generation.weights, generation.step, device) for device in devices}
    first = denoisers[devices[0]]
    classes = first.labels
    generation.labels(seeds[:1], classes)  # raise for invalid options before the first image
    generation.levels(first.form)
    guides: dict[torch.device, Denoiser] = {}
    if (guide := generation.guide) is not None:
        guides = {device: guide.run.denoiser(guide.weights, guide.step, device) for device in devices}
        _check_guide(guide.name, guides[devices[0]], first)
    elif generation.guidance != 1.0 and not run.config.label_dropout:
        raise ValueError(
            f"guidance is {generation.guidance}, but the run had label_dropout 0: without it the model never learned "
            "to denoise without a class. Use guidance 1, give a guide, or train with label_dropout 0.1."
        )

    def sample(device: torch.device, part: Sequence[int]) -> Tensor:
        images = solve(denoisers[device], part, generation, device, guides.get(device))
        if not images.isfinite().all():
            raise RunError(
                f"the image of seed {part[int((~images.isfinite().flatten(1).all(1)).nonzero()[0])]} is not finite: "
                "the checkpoint's weights have diverged (try an earlier --step), or guidance or churn is too strong"
            )
        return run.pictures(images.to(device)).cpu()

    for start, images in draw(sample, seeds, generation.devices, generation.batch_size):
        yield Generated(start, images, generation.labels(seeds[start : start + len(images)], classes))


def solve(
    denoiser: Denoiser,
    seeds: Sequence[int],
    generation: Generation,
    device: torch.device,
    guide: Denoiser | None = None,
) -> Tensor:
    """Draw one image per seed from a denoiser on one device, [len(seeds), C, H, W] float32 on the CPU.

    Args:
        denoiser: on `device`, in eval mode, with its image_shape.
        seeds: one per image.
        generation: solver, its options and labels; weights, step and devices are not read.
        device: where to draw.
        guide: denoiser of `generation.guide`, on `device`.
    """
    assert denoiser.image_shape is not None  # every run's denoiser has one
    options: dict[str, Any] = {} if generation.churn is None else {"churn": generation.churn}
    return SOLVERS[generation.solver](
        denoiser, denoiser.image_shape, seeds, levels=generation.levels(denoiser.form),
        labels=generation.labels(seeds, denoiser.labels), guide=guide, guidance=generation.guidance,
        guided_sigma=generation.guided_sigma, clip=generation.clip, batch_size=generation.batch_size, device=device,
        **options,
    )  # fmt: skip


def _check_guide(name: str, guide: Denoiser, guided: Denoiser) -> None:
    if guide.image_shape != guided.image_shape:
        raise ValueError(
            f"guide {name} has images of shape {guide.image_shape}, expected {guided.image_shape}: those of the model "
            "that it guides"
        )
    if guide.labels not in (0, guided.labels):
        raise ValueError(
            f"guide {name} has number of classes {guide.labels}, expected {guided.labels}, those of the model that it "
            "guides, or none"
        )


def default_generation(
    process: str,
    solver: str | None = None,
    spacing: str | None = None,
    *,
    sigmas: tuple[float, float] = (0.0, math.inf),
    profile: Profile | None = None,
) -> Generation:
    """Default options for a run with the given process and the lowest and highest noise level that its network knows.

    A flow is sampled by "euler", and so is everything with spacing "statistics", which is made for it; all else by
    "heun". "heun" has EDM's noise levels; the other solvers have them too, except for a flow, where their times are
    evenly spaced.
    """
    flow = process == "flow"
    solver = solver or ("euler" if flow or spacing == "statistics" else "heun")
    spacing = spacing or ("flow" if flow and solver != "heun" else "edm")
    generation = Generation(solver, spacing=spacing, profile=profile)
    lowest, highest = sigmas
    limits: dict[str, float] = {}
    if generation.sigma_max is not None and generation.sigma_max > highest:
        limits["sigma_max"] = highest
    if generation.sigma_min is not None and lowest > _FAR_ABOVE * generation.sigma_min:
        limits["sigma_min"] = lowest
    return with_options(generation, **limits)


def with_options(generation: Generation, **options: object) -> Generation:
    """`generation` with the given options that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(generation, **given)  # type: ignore[arg-type]
