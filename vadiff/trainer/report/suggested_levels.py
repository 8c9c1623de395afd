"""Suggested noise levels as text, JSON and a picture, beside the usual defaults."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extras import import_extra
from ...levels import information_density
from ..training.level_evidence import GIVEN, INFERRED, LATENTS, LENGTH, NUMBERS, PIXELS, Evidence

FITS, NEAR, NO_FIT, UNKNOWN = "fits", "near", "does not fit", "cannot be told apart"  # what is said of a default
# Least share of draws that a default has in common with the suggestion. Measured on the digits, what the suggestion
# changed from the default: at 80 % (pixels x 1/4) loss +0.5 %, Fréchet distance -13 %; at 68 % (x 1) -1 %, -25 %; at
# 29 % (x 4) -26 %, -65 %. See benchmarks/results/placement.md.
_LEAST = {FITS: 0.9, NEAR: 0.7}
_UNSURE = 0.2  # uncertainty of a mean up to which it is told apart from a default in any case
_REACH = 9.0  # standard deviations over which two densities are compared


class Default(NamedTuple):
    """A normal distribution of ln(sigma/alpha) that is in use."""

    name: str
    mean: float
    std: float
    source: str


# Of EDM's objective, then of flow matching, where ln(sigma/alpha) = logit(t).
DEFAULTS = {
    "edm": (
        Default("EDM", -1.2, 1.2, "arXiv 2206.00364, pixels of [-1, 1], sigma_data 0.5"),
        Default("EDM2", -0.4, 1.0, "arXiv 2312.02696, latents of ImageNet-512"),
    ),
    "flow": (Default("SD3", 0.0, 1.0, "arXiv 2403.03206, latents"),),
}
_SIGMA_DATA = {
    PIXELS: "standard deviation of the pixels",
    LATENTS: "to which latents are scaled",
    GIVEN: "as given",
    INFERRED: "inferred from the errors at the highest noise: the deviation from the mean image",
}
# Of benchmarks/results/suggested_levels.json and levels-suggest/digits.json.
_NOT_SHOWN = (
    "Partly shown, and larger: how the network was trained (digits, five objectives: P_mean -0.43 to -0.16, lowest for",
    "x0 on a cosine schedule) and for how long (P_mean rises: digits -0.27 after 150 steps, -0.24 after 300).",
)
_MEASURED_NEAR = {  # of the usual default, in benchmarks/results/placement.json
    "edm": "with 80 % in common, the suggestion changed the held-out loss of the digits by +0.5 % and their\n"
    "Fréchet distance by -13 % (benchmarks/results/placement.md, pixels x 1/4)",
    "flow": "with 87 % in common, the suggestion changed the held-out loss of the digits by -4 % and their\n"
    "Fréchet distance by less than 1 % (benchmarks/results/placement.md, flow)",
}
_COLORS = {"EDM": "#0072B2", "EDM2": "#CC79A7", "SD3": "#0072B2"}  # Okabe & Ito's
_SUGGESTED = "#D55E00"


def suggested_normal(evidence: Evidence, objective: str) -> tuple[float, float]:
    """Suggested mean and standard deviation of ln(sigma/alpha) for "edm" or "flow"."""
    found = evidence.suggestion
    return (found.p_mean, found.p_std) if objective == "edm" else (found.logit_mean, found.logit_std)


def shared_draws(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Share of draws that two normal distributions, (mean, std) each, have in common: ∫ min(p, q)."""
    low = min(mean - _REACH * std for mean, std in (first, second))
    high = max(mean + _REACH * std for mean, std in (first, second))
    at = torch.linspace(low, high, 4001, dtype=torch.float64)
    return float(torch.trapezoid(torch.minimum(_normal(at, *first), _normal(at, *second)), at))


def verdict(evidence: Evidence, objective: str, default: Default) -> str:
    """`FITS`, `NEAR` or `NO_FIT` by the share of draws in common; `UNKNOWN` if the mean is too uncertain for that."""
    mean, std = suggested_normal(evidence, objective)
    uncertainty = evidence.uncertainty("p_mean" if objective == "edm" else "logit_mean") or 0.0
    if uncertainty > _UNSURE and uncertainty >= abs(default.mean - mean):
        return UNKNOWN
    shared = shared_draws((mean, std), (default.mean, default.std))
    return next((name for name, least in _LEAST.items() if shared >= least), NO_FIT)


def suggestion_table(evidence: Evidence) -> str:
    """The suggestion for people: numbers, how sure they are, defaults, and the lines to type."""
    found = evidence.suggestion
    lines = [f"From {evidence.source}.", ""]
    heads = ["from half to all steps" if name == LENGTH else f"between {name}" for name in evidence.differences]
    lines.append(f"{'':<12}{'suggested':>10}" + "".join(f"{head:>24}" for head in heads))
    lines.append(f"{'sigma_data':<12}{found.sigma_data:>10.3f}   {_SIGMA_DATA[evidence.sigma_data_from]}")
    for name in NUMBERS:
        row = f"{name:<12}{_two_digits(getattr(found, name)):>10}"
        for what, changes in evidence.differences.items():
            change = changes[name]
            row += f"{_two_digits(change, sign=True) if what == LENGTH else _two_digits(abs(change)):>24}"
        lines.append(row)
    if evidence.warning is not None:
        lines.append(f"Warning: {evidence.warning}.")
    lines += [
        "",
        "The columns show how far the numbers repeat themselves." if evidence.differences else
        "How far the numbers repeat themselves cannot be seen from one network: --data trains four.",
        *_NOT_SHOWN,
    ]  # fmt: skip
    lines += ["", *_defaults(evidence, "edm"), "", *_defaults(evidence, "flow")]
    return "\n".join(lines)


def suggestion_content(evidence: Evidence) -> dict[str, Any]:
    """The suggestion for programs: numbers, differences, defaults and the profile, as JSON takes them."""
    found = evidence.suggestion
    profile = found.profile
    columns = (profile.sigma, profile.log_snr, profile.x0_error, profile.rate_at(profile.log_snr))
    return {
        "source": evidence.source,
        "sigma_data": found.sigma_data,
        "sigma_data_from": evidence.sigma_data_from,
        "warning": evidence.warning,
        "command": evidence.command,
        **{name: getattr(found, name) for name in NUMBERS},
        "differences": evidence.differences,
        "uncertainty": {name: evidence.uncertainty(name) for name in NUMBERS},
        "defaults": [
            {
                "name": default.name,
                "objective": objective,
                "mean": default.mean,
                "std": default.std,
                "shared_draws": shared_draws(suggested_normal(evidence, objective), (default.mean, default.std)),
                "verdict": verdict(evidence, objective, default),
            }
            for objective, defaults in DEFAULTS.items()
            for default in defaults
        ],
        "profile": [
            dict(zip(("sigma", "log_snr", "x0_error", "rate"), row, strict=True))
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ],
        "x0_error_of_each": [each.x0_error.tolist() for each in evidence.profiles],
    }


def suggestion_figure(evidence: Evidence) -> Any:
    """The information rate over sigma, and for both objectives the suggested density beside the usual defaults.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(7.2, 8.4), dpi=120, facecolor="white", layout="constrained"
    )
    rates, *panels = figure.subplots(3, 1, sharex=True)
    profile = evidence.suggestion.profile
    low, high = (math.log(sigma) for sigma in (float(profile.sigma.min()), float(profile.sigma.max())))
    at = torch.linspace(low, high, 600, dtype=torch.float64)  # ln sigma
    for each in evidence.profiles:
        rates.plot(each.sigma, each.rate_at(each.log_snr), color="0.6", linewidth=1, marker=".", markersize=4)
    rates.plot(at.exp(), profile.rate_at(-2.0 * at), color=_SUGGESTED, linewidth=2)
    rates.set_title("information rate min(x0 error / σ², 1)", fontsize=10)
    rates.set_ylim(0.0, 1.05)
    names = {"edm": "EDM's objective", "flow": "flow matching, σ/α = t/(1 − t)"}
    for panel, (objective, defaults) in zip(panels, DEFAULTS.items(), strict=True):
        mean, std = suggested_normal(evidence, objective)
        density = information_density(profile, at, objective, evidence.suggestion.sigma_data)
        panel.fill_between(at.exp(), 0.0, density, color="0.85", label="profile's density")
        label = f"suggested ({_two_digits(mean)}, {std:.2f})"
        panel.plot(at.exp(), _normal(at, mean, std), color=_SUGGESTED, linewidth=2, label=label)
        for default in defaults:
            label = f"{default.name} ({default.mean:g}, {default.std:g})"
            panel.plot(
                at.exp(), _normal(at, default.mean, default.std), color=_COLORS[default.name], linestyle="--",
                label=label,
            )  # fmt: skip
        panel.set_title(f"{names[objective]}: density of training levels over ln(σ/α)", fontsize=10)
        panel.set_ylim(bottom=0.0)
        panel.legend(frameon=False, fontsize=9)
    for panel in (rates, *panels):
        panel.set_xscale("log")
        panel.grid(alpha=0.25)
    panels[-1].set_xlabel("noise level σ/α      ← less noise · more noise →")
    return figure


def _defaults(evidence: Evidence, objective: str) -> list[str]:
    """The defaults of an objective, whether they fit, and what to type."""
    mean, std = suggested_normal(evidence, objective)
    names = ("P_mean", "P_std") if objective == "edm" else ("mean", "std")
    title = "EDM's objective, ln(sigma)" if objective == "edm" else "Flow matching, logit-normal t"
    lines = [f"{title:<34}{names[0]:>8}{names[1]:>8}{'draws in common':>18}"]
    lines.append(f"{'  suggested':<34}{_two_digits(mean):>8}{std:>8.2f}")
    for default in DEFAULTS[objective]:
        shared = shared_draws((mean, std), (default.mean, default.std))
        said = verdict(evidence, objective, default)
        lines.append(f"{'  ' + default.name:<34}{default.mean:>8.2f}{default.std:>8.2f}{shared:>18.0%}  {said}")
    usual = DEFAULTS[objective][0]
    said = verdict(evidence, objective, usual)
    comments = {
        FITS: "default fits: no levels to change",
        NEAR: f"default is near: {_MEASURED_NEAR[objective]}",
        UNKNOWN: "default and the suggestion cannot be told apart: train longer or use more images",
    }
    if said in comments:
        lines.append(f"{usual.name}'s {comments[said]}.")
    return lines + lines_to_type(evidence, objective)


def lines_to_type(evidence: Evidence, objective: str) -> list[str]:
    """A command of `vadiff train` or, where that is not known, the flags to add to one, for each alternative.

    EDM's has sigma_data in any case, and its levels if they are to change; a flow's are two alternatives, or none.
    """
    found, usual = evidence.suggestion, DEFAULTS[objective][0]
    mean, std = (_two_digits(number) for number in suggested_normal(evidence, objective))
    changes = verdict(evidence, objective, usual) in (NEAR, NO_FIT)
    if objective == "edm":
        flags = [f"--sigma-data {found.sigma_data:.3g}" + (f" --p-mean {mean} --p-std {std}" if changes else "")]
    else:
        options = f"--levels-options mean={mean},std={std}", f"--shift {found.alpha:.2f}"
        flags = [f"--process flow --levels logit_normal {each}" for each in options] if changes else []
    starts = (
        "Add to your command:" if evidence.command is None else f"Type: {evidence.command}",
        f"or, which shifts {usual.name}'s levels: {evidence.command or ''}".rstrip(),
    )
    return [f"{start} {each}" for start, each in zip(starts, flags, strict=False)]


def _normal(at: Tensor, mean: float, std: float) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(at).exp()


def _two_digits(value: float, *, sign: bool = False) -> str:
    value = round(value, 2) + 0.0  # no -0.00
    return f"{value:+.2f}" if sign else f"{value:.2f}"
