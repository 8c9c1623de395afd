"""`vadiff report`: a self-contained HTML page about runs, and its charts as files."""

import base64
import importlib.resources
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..._version import __version__
from ...extras import import_extra
from ...files import replacing
from . import charts, held_out_charts
from .magnitudes import magnitudes_svg
from .overview import Table, overview_table, settings_table, several_seeds
from .runs import Group
from .style import Chart

_SAMPLE_GRIDS = 6  # per group: enough to see the development


@dataclass(frozen=True)
class Picture:
    """A picture inlined in the page."""

    title: str
    source: str  # data: URL


@dataclass(frozen=True)
class Strip:
    """Pictures in a row."""

    title: str
    pictures: Sequence[Picture]
    wide: bool = False  # charts with text, not grids of small images


@dataclass
class Section:
    """A part of the page."""

    anchor: str
    title: str
    text: str = ""
    table: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)


def write_report(groups: Sequence[Group], page: Path, *, title: str | None = None) -> list[Path]:
    """Write the page, and each of its charts as PNG and SVG into a folder of the page's name beside it.

    The page is one file with inlined pictures, without scripts or external resources.

    Args:
        groups: at least one; the others are compared with the first.
        page: file to write or replace, ending in .html.
        title: of the page.

    Returns:
        The files of the charts.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    jinja2 = import_extra("jinja2", "report")
    import_extra("matplotlib", "report")
    template_text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template_text)
    sections = sections_of(groups)
    paths = ", ".join(str(run.path) for group in groups for run in group.runs)
    html = template.render(
        title=title or _title(groups),
        lead=_lead(groups),
        notes=_notes(groups),
        held_out_of_train=_held_out_of_train(groups),
        sections=[{**vars(section), "blocks": _blocks(section.charts)} for section in sections],
        settings=settings_table(groups),
        footer=f"Made by vadiff {__version__} from {paths}",
    )
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in (chart for section in sections for chart in section.charts):
        for kind in ("png", "svg"):
            files.append(folder / f"{chart.name}.{kind}")
            files[-1].write_bytes(chart.picture(kind, described=True))
    with replacing(page) as partial:
        partial.write_text(html, encoding="utf-8")
    return files


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """The sections of the page for which the runs have data."""
    found = [_overview(groups), _noise_levels(groups), _over_training(groups), _curves(groups)]
    found.append(_magnitudes(groups))
    found += [_held_out(groups), _gap(groups), _gradients(groups), _metrics(groups), _samples(groups)]
    return [section for section in found if section is not None]


def _blocks(found: Sequence[Chart]) -> list[dict[str, Any]]:
    """Groups of charts of one kind, to be shown side by side under one caption."""
    return [
        {
            "title": title,
            "caption": charts_of_kind[0].caption,
            "pictures": [
                Picture(
                    chart.group if len(charts_of_kind) > 1 else "",
                    _data_url(chart.picture("svg", described=False, compact=len(charts_of_kind) > 2)),
                )
                for chart in charts_of_kind
            ],
        }
        for title, kind in itertools.groupby(found, key=lambda chart: chart.title)
        for charts_of_kind in [list(kind)]
    ]


def _overview(groups: Sequence[Group]) -> Section:
    return Section(
        "overview",
        "In short",
        "Values of each run at its last logged step. Values with ± are mean and standard deviation over seeds."
        if several_seeds(groups)
        else "Values of each run at its last logged step.",
        table=overview_table(groups),
    )


def _noise_levels(groups: Sequence[Group]) -> Section:
    top = charts.base_loss_top(groups)
    section = Section(
        "noise-levels",
        "Noise level by noise level",
        "The end of training at each noise level, from the running statistics of the training loss, in which recent "
        "samples count most.",
        charts=[charts.base_loss(group, top) for group in groups],
    )
    if len(groups) > 1:
        section.charts += [charts.base_losses_compared(groups), charts.relative_std_compared(groups)]
    section.charts += [charts.weights_compared(groups), charts.share_of_samples(groups)]
    return section


def _over_training(groups: Sequence[Group]) -> Section | None:
    if max(len(charts.group_images(group)) for group in groups) < 2:
        return None
    spans = charts.heatmap_spans(groups)
    spread = "std" if len(groups) == 1 else "relative_std"
    section = Section(
        "over-training",
        "Over training",
        "Each column of a chart is one moment of training, each row one noise level. All charts of a kind share their "
        "colours and axes.",
    )
    for what in (spread, "weights"):
        limits = charts.heatmap_limits(groups, what)
        shown = charts.changing(groups) if what == "weights" else groups
        section.charts += [charts.heatmap(group, what, limits, spans) for group in shown]
    return section


def _curves(groups: Sequence[Group]) -> Section:
    section = Section("curves", "Training curves")
    if charts.has_scalar(groups, "level_free_loss"):
        section.charts.append(
            charts.curve(
                groups,
                "level_free_loss",
                "training-level-free-loss",
                "Training loss, free of the levels drawn",
                "Base loss of the images since the last logged step, corrected by what their noise levels cost more "
                "or less than average: the curve falls when the network improves, not when easier levels are drawn, "
                "and does not lag. Look for a curve that has stopped falling, and for spikes.",
                "level-free base loss, mean per pixel",
            )
        )
    section.charts.append(
        charts.curve(
            groups,
            "base_loss",
            "training-base-loss",
            "Training loss",
            "Base loss over all noise levels, before the adaptive weight, from the running statistics. Look for a "
            "curve that has stopped falling. It says little about the quality of samples.",
            "base loss, mean per pixel",
        )
    )
    if charts.has_scalar(groups, "grad_norm"):
        section.charts.append(
            charts.curve(
                groups,
                "grad_norm",
                "gradient-norm",
                "Norm of the gradient",
                "Before clipping. Look for jumps and growth: signs of a learning rate that is too high.",
                "norm of the gradient",
            )
        )
    return section


def _magnitudes(groups: Sequence[Group]) -> Section | None:
    """RMS over training (`log_rms`) of the first run of each group, if logged."""
    runs = {group.label: group.first.magnitudes for group in groups if group.first.magnitudes}
    if not runs:
        return None
    text = (
        "Root mean square per layer. Look for weights that grow, which makes the same update ever smaller in "
        "proportion, and for activations that drift apart."
    )
    picture = Picture("", _data_url(magnitudes_svg(runs)))
    return Section("magnitudes", "Magnitudes over training", text, strips=[Strip("", [picture], wide=True)])


def _held_out(groups: Sequence[Group]) -> Section | None:
    if not held_out_charts.has_held_out(groups):
        return None
    section = Section(
        "held-out",
        "On images never trained on",
        "EDM's loss, the squared error of the denoised image times 1/σ² + 1/σ_data², for the same images, noise levels "
        "and noise in every run and at every checkpoint.",
    )
    if len(groups) > 1 and held_out_charts.comparable(groups):
        section.charts.append(held_out_charts.ratio_to_first(groups))
    if any(len(run.held_out) > 1 for group in groups for run in group.runs):
        section.charts.append(held_out_charts.over_training(groups))
    section.charts += held_out_charts.final_levels(groups)
    return section


def _gap(groups: Sequence[Group]) -> Section | None:
    """The chart of `vadiff evaluate --gap`, if a single run is shown and was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gap:
        return None
    pictures = [Picture("", _data_url(file.read_bytes())) for file in groups[0].first.gap]
    text = (
        "Measured at the last evaluated checkpoint: loss on images that were trained on, and the optimal loss of the "
        "data set, the lowest that any network can have on them. Training can only reduce the gap between the two."
    )
    return Section("gap", "Gap to the optimal loss", text, strips=[Strip("", pictures, wide=True)])


def _gradients(groups: Sequence[Group]) -> Section | None:
    """The charts of `vadiff evaluate --gradients`, if a single run is shown and was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gradients:
        return None
    pictures = [Picture("", _data_url(file.read_bytes())) for file in groups[0].first.gradients]
    text = "Measured at the last evaluated checkpoint, on training images, for the trained (raw) weights."
    return Section("gradients", "Gradients per noise level", text, strips=[Strip("", pictures, wide=True)])


def _metrics(groups: Sequence[Group]) -> Section | None:
    drawn = [charts.metric(groups, name) for name in charts.metric_names(groups)]
    if not drawn:
        return None
    text = (
        "Generated images compared with real ones by the features of an Inception network. Such numbers depend on the "
        "number of images and on the layer of the network: compare them only with numbers made in the same way."
    )
    return Section("metrics", "Quality of generated images", text, charts=drawn)


def _samples(groups: Sequence[Group]) -> Section | None:
    strips = []
    for group in groups:
        found = group.first.samples
        if found:
            chosen = sorted({round(place) for place in np.linspace(0, len(found) - 1, min(len(found), _SAMPLE_GRIDS))})
            pictures = [Picture(f"step {found[i][0]:,}", _data_url(found[i][1].read_bytes(), "png")) for i in chosen]
            strips.append(Strip(group.label if len(groups) > 1 else "", pictures))
    if not strips:
        return None
    text = (
        "Every grid starts from the same noise, so that one cell can be followed through training and across runs. "
        "Look for broken or smeared structures, and for cells that look alike."
    )
    return Section("samples", "Generated images over training", text, strips=strips)


def _title(groups: Sequence[Group]) -> str:
    dataset = str(groups[0].first.config.get("dataset", "")).replace("_", " ")
    if len(groups) == 1:
        return f"Training on {dataset}: {groups[0].first.config['weighting'].replace('_', ' ')} weighting"
    return f"{len(groups)} ways to train on {dataset}, compared"


def _held_out_of_train(groups: Sequence[Group]) -> str:
    """Numbers of training images held out, for data sets without a test part; empty if all have one."""
    numbers = {group.first.held_out_number for group in groups if group.first.held_out_is_test is False}
    return " or ".join(f"{number:,}" for number in sorted(numbers - {None}, key=str))


def _lead(groups: Sequence[Group]) -> str:
    config = groups[0].first.config
    runs = sum(len(group.runs) for group in groups)
    text = (
        f"{runs} run{'s' if runs > 1 else ''} of {config['steps']:,} steps with {config['batch_size']} images each, "
        f"{config['process'].upper() if config['process'] == 'edm' else config['process']} objective."
    )
    if len(groups) > 1:
        text += f" Compared: {'; '.join(group.label for group in groups)}. Each is compared with {groups[0].label}."
    return text


def _notes(groups: Sequence[Group]) -> list[str]:
    """Caveats to read before the charts."""
    notes = []
    for group in groups:
        for run in group.runs:
            if run.step[-1] < run.config["steps"]:
                notes.append(f"{run.name} is at step {run.step[-1]:,} of {run.config['steps']:,}: not finished.")
            if not run.held_out:
                notes.append(f"{run.name} was not measured on held-out images yet: that section is missing.")
    fewest = min(len(group.runs) for group in groups)
    if len(groups) > 1 and fewest < 10:
        seeds = "one seed" if fewest == 1 else f"{fewest} seeds"
        notes.append(
            f"Differences between runs rest on {seeds} here. Small ones may be chance; fewer than ten say "
            "nothing about the spread over seeds."
        )
    return notes


def _data_url(content: bytes, kind: str = "svg+xml") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
