"""Training config. Each field is also a flag of `vadiff train`; `config_schema` defines them, with their help texts."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import levels, weighting
from .._validation import did_you_mean, number_options
from ..augmentation import SMALLEST
from ..errors import RunError
from ..extras import import_extra
from ..models import Parameterisation, check_attention, check_halvings, parameterisation
from ..models.parameterisation import VP, sigma_range
from .config_fields import check, typed
from .config_schema import (
    AUTO,
    CURVE_WEIGHTINGS,
    FLUX_PATCH,
    GAP,
    LATENT_STD,
    POSTERIOR_MEAN,
    SHAPES,
    STREAMED,
    TABLE,
    TIMESTEPS,
    ConfigSchema,
)


@dataclass(frozen=True)
class TrainConfig(ConfigSchema):
    """One training run; the defaults are the preset `digits`. `vadiff train --help` explains every field.

    Runs with the same seeds start from the same weights and see the same images, noise levels and noise.

    Raises:
        ValueError: a field is out of bounds, of the wrong type, or inconsistent with another.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = typed(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            check(field, value)
        for name in ("log_snr_range", "held_out_sigma"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} is {(low, high)}, expected a lower and a higher number")
        check_halvings(self.image_shape, self.channels)
        check_attention(self.image_shape[1], self.channels, self.attention_resolutions)
        if isinstance(self.shift, str) and self.shift not in levels.SHIFT_RULES:
            raise ValueError(f"shift is {self.shift!r}, expected a number or one of {', '.join(levels.SHIFT_RULES)}")
        self._check_data()
        if self.stratified_epoch and self.antithetic:
            raise ValueError(
                "antithetic is true, but so is stratified_epoch, whose numbers are not in pairs: choose one"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, which does not divide batch_size = {self.batch_size}")
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}, expected each width once")
        if TABLE in (self.weighting, self.levels) and self.table is None:
            raise ValueError(
                "table is None, but weighting or levels is 'table': give the run directory to take it from"
            )
        if self.profile is not None and self.levels != "information":
            raise ValueError(
                f"profile is {self.profile}, expected none with levels {self.levels}: information reads it"
            )
        fewest = 4 * self.batch_size // self.accumulate
        if self.reference != "all" and (isinstance(self.reference, str) or self.reference < 2):
            raise ValueError(f"reference is {self.reference!r}, expected all, or a number of images of at least 2")
        if self.target == POSTERIOR_MEAN and self.reference != "all" and int(self.reference) < fewest:
            raise ValueError(
                f"reference is {self.reference}, expected at least {fewest}: four times the {fewest // 4} images of a "
                "step (of one part of it with --accumulate), as they share their references"
            )
        if self.process not in VP and self.timesteps != TIMESTEPS:
            raise ValueError(
                f"timesteps is {self.timesteps}, expected {TIMESTEPS}, the default: {self.process} has no timesteps"
            )
        if self.timesteps == 1:
            raise ValueError("timesteps is 1, expected 0 for continuous time, or at least 2")
        self.held_out_range()
        self._check_options()
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ValueError(f"device is {self.device!r}, expected auto, cpu, cuda or cuda:N") from None

    def _check_data(self) -> None:
        self._check_augmentation()
        if self.cache == "none" and self.dataset not in STREAMED:
            raise ValueError(f"cache is none, expected auto, device or host: {self.dataset} is read as a whole")
        if self.dataset == "latents":
            if self.flips:
                raise ValueError(
                    "flips is true, expected false: mirrored latents are not the latents of mirrored images, which "
                    "`vadiff encode --flips` stores too"
                )
            if self.sigma_data != LATENT_STD:
                raise ValueError(
                    f"sigma_data is {self.sigma_data:g}, expected {LATENT_STD:g}: the standard deviation to which "
                    "latents are scaled"
                )

    def _check_options(self) -> None:
        """Refuse options that the weighting or the level sampler does not have."""
        made_by: dict[str, type | None] = {"weighting": None, "levels": None}  # None: it has no options
        sampler = self.levels_of_process
        if self.weighting != TABLE:
            made_by["weighting"] = CURVE_WEIGHTINGS.get(self.weighting) or weighting.class_of(self.weighting)
        if sampler != TABLE:
            made_by["levels"] = levels.GapLevels if sampler == GAP else levels.class_of(sampler)
        for kind, name in (("weighting", self.weighting), ("levels", sampler)):
            made, given = made_by[kind], getattr(self, f"{kind}_options")
            known = () if made is None else number_options(made)
            for option in given:
                if option not in known:
                    advice = did_you_mean(option, known) or "."
                    raise ValueError(
                        f"{kind}_options is {given}: {name} has no option {option}{advice} "
                        f"It has {', '.join(known) or 'none'}"
                    )

    @property
    def levels_of_process(self) -> str:
        """`levels`, with what `auto` stands for."""
        if self.levels != AUTO:
            return self.levels
        return "uniform_time" if self.process in VP else "log_normal"

    def _check_augmentation(self) -> None:
        if not self.augment:
            return
        if self.dataset == "latents":
            raise ValueError(
                f"augment is {self.augment:g}, expected 0 with latents: a transformed latent is not that of the "
                "transformed image"
            )
        if min(self.image_shape[1:]) < SMALLEST:
            raise ValueError(
                f"augment is {self.augment:g}, expected 0 for images of {self.image_shape[1]} x {self.image_shape[2]} "
                f"pixels: augmentation needs at least {SMALLEST} x {SMALLEST}"
            )
        alone = "the network is told how its image was augmented, and no other image is augmented alike"
        if self.target == POSTERIOR_MEAN:
            raise ValueError(f"augment is {self.augment:g}, expected 0 with target posterior_mean: {alone}")
        if GAP in (self.weighting, self.levels) or self.weighting in CURVE_WEIGHTINGS:
            raise ValueError(
                f"augment is {self.augment:g}, expected 0 with weighting or levels from the optimal loss, which "
                "is that of the images as they are"
            )

    def form(self) -> Parameterisation:
        """What the network predicts, of which process.

        Raises:
            ValueError: prediction, process, timesteps and zero_terminal_snr do not belong together.
        """
        discrete = self.timesteps if self.timesteps and self.process in VP else None
        return parameterisation(
            self.process, None if self.prediction == AUTO else self.prediction, sigma_data=self.sigma_data,
            timesteps=discrete, zero_terminal_snr=self.zero_terminal_snr,
        )  # fmt: skip

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels = self.image_channels if self.dataset == "latents" else 3
        return SHAPES.get(self.dataset, (channels, self.image_size, self.image_size))

    @property
    def mirrored_data(self) -> bool:
        """Whether mirrored images belong to the data: with `flips`, unless the network is told which are mirrored."""
        return self.flips and not self.augment

    @property
    def shift_alpha(self) -> float:
        """`shift` as a number."""
        if isinstance(self.shift, float):
            return self.shift
        channels, height, width = self.image_shape
        size = {"sd3": height * width, "rae": channels * height * width, "flux": height * width / FLUX_PATCH**2}
        return levels.shift_alpha(self.shift, size[self.shift])

    def held_out_range(self) -> tuple[float, float]:
        """`held_out_sigma`, as far as the process has these noise levels: a network knows no time for others.

        Raises:
            ValueError: as for `form`; or the process has no noise levels there.
        """
        lowest, highest = sigma_range(self.form())
        low, high = max(self.held_out_sigma[0], lowest), min(self.held_out_sigma[1], highest)
        if not low < high:
            raise ValueError(
                f"held_out_sigma is {self.held_out_sigma}, expected a range that overlaps with {lowest:.4g} to "
                f"{highest:.4g}, the noise levels of {self.process}"
            )
        return low, high

    def resolved(self) -> "TrainConfig":
        """The config with the levels and the prediction that `auto` stands for."""
        return dataclasses.replace(self, levels=self.levels_of_process, prediction=self.form().prediction)

    @property
    def name(self) -> str:
        """The name of the weighting."""
        return self.weighting

    def torch_device(self) -> torch.device:
        """Resolve `device` on this machine; a run's config may name a device of another machine.

        Raises:
            ValueError: no such device on this machine.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {self.device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
                "`vadiff doctor` says what this machine has"
            )
        return device

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings, lists and mappings."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def save(self, path: Path) -> None:
        """Write the fields as YAML, `auto` replaced by what it stands for.

        Raises:
            MissingExtraError: PyYAML is not installed.
        """
        path.write_text(import_extra("yaml", "train").safe_dump(self.resolved().as_dict(), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Read a YAML file, written by `save` or by hand.

        Raises:
            RunError: not YAML, an unknown field or an invalid value.
            MissingExtraError: PyYAML is not installed.
        """
        yaml = import_extra("yaml", "train")
        try:
            fields = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(fields, Mapping):
            raise RunError(f"{path} holds {type(fields).__name__}, expected the fields of a training config")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise RunError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from plain values; missing fields get their defaults.

        Raises:
            ValueError: an unknown field or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            advice = did_you_mean(unknown[0], known)
            raise ValueError(f"{', '.join(unknown)}: no such field{advice or '; `vadiff train --help` lists them'}")
        return cls(**fields)
