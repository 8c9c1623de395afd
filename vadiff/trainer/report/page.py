"""`vadiff report`: a self-contained HTML page about runs."""

import base64
import dataclasses
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
from . import charts, held_out_charts, style, training_charts
from .equal_images import at_equal_images
from .gap import gap_chart
from .gradient_charts import gradient_charts
from .magnitudes import magnitude_charts
from .notes import notes_of
from .overview import Table, differences_explained, overview_table, settings_table, several_seeds
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


@dataclass
class Section:
    """A part of the page."""

    anchor: str
    title: str
    text: str = ""
    table: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)


def write_report(groups: Sequence[Group], page: Path, *, title: str | None = None) -> int:
    """Write the page: one file with everything in it, which makes no requests.

    Args:
        groups: at least one; the others are compared with the first.
        page: file to write or replace, ending in .html.
        title: of the page.

    Returns:
        The number of its charts.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    paths = ", ".join(str(run.path) for group in groups for run in group.runs)
    return write_page(
        page,
        sections_of(groups),
        title=title or title_of(groups),
        lead=lead_of(groups),
        notes=notes_of(groups),
        held_out_of_train=_held_out_of_train(groups),
        settings=settings_table(groups),
        source=paths,
    )


def write_page(
    page: Path,
    sections: Sequence[Section],
    *,
    title: str,
    lead: str,
    notes: Sequence[str],
    source: str,
    settings: Table | None = None,
    held_out_of_train: str = "",
) -> int:
    """Write a page of these sections; see `write_report`.

    Args:
        page: file to write or replace, ending in .html.
        sections: in their order.
        title, lead, notes: the head of the page.
        source: what it was made from.
        settings: of the runs, if they are `vadiff train`'s.
        held_out_of_train: number of training images that were held out, if any.

    Returns:
        The number of charts.
    """
    jinja2 = import_extra("jinja2", "report")
    plotly = import_extra("plotly.io", "report")
    template_text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template_text)
    sections = _named_apart(sections)
    charts = [chart for section in sections for chart in section.charts]
    html = template.render(
        title=title,
        lead=lead,
        notes=notes,
        held_out_of_train=held_out_of_train,
        sections=sections,
        settings=settings,
        footer=f"Made by vadiff {__version__} from {source}",
        plotly_js=import_extra("plotly.offline", "report").get_plotlyjs() if charts else "",
        figures={chart.name: plotly.to_json(chart.figure) for chart in charts},
        modes={mode: plotly.to_json(style.template(mode), validate=False) for mode in ("light", "dark")},
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(page) as partial:
        partial.write_text(html, encoding="utf-8")
    return len(charts)


def _named_apart(sections: Sequence[Section]) -> list[Section]:
    """The sections with a number after an anchor, or a name of a chart, that one before has: each is once on a page."""
    taken: set[str] = set()

    def free(name: str) -> str:
        number = next(number for number in itertools.count(1) if _with(name, number) not in taken)
        taken.add(_with(name, number))
        return _with(name, number)

    return [
        dataclasses.replace(
            section,
            anchor=free(section.anchor),
            charts=[
                dataclasses.replace(chart, name=free(f"chart-{chart.name}").removeprefix("chart-"))
                for chart in section.charts
            ],
        )
        for section in sections
    ]


def _with(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """The sections of the page for which the runs have data.

    Values and charts of the end of training compare the runs at equal numbers of images.
    """
    equal, images = at_equal_images(groups)
    found = [_overview(equal, images), _noise_levels(equal, images), _over_training(groups), _curves(groups)]
    found += [_magnitudes(groups), _held_out(groups, equal), _gap(groups), _gradients(groups)]
    found += [_metrics(groups), _samples(groups)]
    return [section for section in found if section is not None]


def _moment(images: int | None) -> str:
    return "at its last logged step" if images is None else f"after {images:,} training images, which all have seen"


def _overview(groups: Sequence[Group], images: int | None) -> Section:
    text = f"Values of each run {_moment(images)}."
    if several_seeds(groups):
        text += " Values with ± are mean and standard deviation over seeds."
    return Section("overview", "In short", f"{text} {differences_explained(groups)}", table=overview_table(groups))


def _noise_levels(groups: Sequence[Group], images: int | None) -> Section:
    several = [charts.base_losses_compared(groups), charts.relative_std_compared(groups)]
    return Section(
        "noise-levels",
        "Noise level by noise level",
        f"{'The end of training' if images is None else f'The state {_moment(images)},'} at each noise level, from the "
        "running statistics of the training loss, in which recent samples count most.",
        charts=[
            *(several if len(groups) > 1 else [charts.base_loss(groups[0])]),
            charts.weights_compared(groups),
            charts.balance(groups),
            charts.share_of_samples(groups),
        ],
    )


def _over_training(groups: Sequence[Group]) -> Section | None:
    if max(len(charts.group_images(group)) for group in groups) < 2:
        return None
    spread = "std" if len(groups) == 1 else "relative_std"
    text = "Left to right: training. Bottom to top: noise levels, from much noise to little."
    if len(groups) > 1:
        text += " The menu above a chart chooses the run; colours and axes stay the same."
    return Section(
        "over-training",
        "Over training",
        text,
        charts=[
            training_charts.heatmap(groups, spread),
            training_charts.heatmap(training_charts.changing(groups), "weights"),
        ],
    )


def _curves(groups: Sequence[Group]) -> Section:
    section = Section("curves", "Training curves")
    if training_charts.has_scalar(groups, "level_free_loss"):
        section.charts.append(
            training_charts.curve(
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
        training_charts.curve(
            groups,
            "base_loss",
            "training-base-loss",
            "Training loss",
            "Base loss over all noise levels, before the adaptive weight, from the running statistics. Look for a "
            "curve that has stopped falling. It says little about the quality of samples.",
            "base loss, mean per pixel",
        )
    )
    if training_charts.has_scalar(groups, "grad_norm"):
        section.charts.append(
            training_charts.curve(
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
    found = magnitude_charts(groups)
    text = "Root mean square per layer of the network."
    return Section("magnitudes", "Magnitudes over training", text, charts=found) if found else None


def _held_out(groups: Sequence[Group], equal: Sequence[Group]) -> Section | None:
    """The held-out loss over training, and at `equal` images per noise level."""
    if not held_out_charts.has_held_out(groups):
        return None
    section = Section(
        "held-out",
        "On images never trained on",
        "EDM's loss, the squared error of the denoised image times 1/σ² + 1/σ_data², for the same images, noise levels "
        f"and noise {'in every run and ' if held_out_charts.comparable(groups) else ''}at every checkpoint.",
    )
    measured = held_out_charts.has_held_out(equal)
    if measured and len(groups) > 1 and held_out_charts.comparable(equal):
        section.charts.append(held_out_charts.ratio_to_first(equal))
    if any(len(run.held_out) > 1 for group in groups for run in group.runs) or not measured:
        section.charts.append(held_out_charts.over_training(groups))
    if measured:
        section.charts.append(held_out_charts.final_levels(equal))
    return section


def _gap(groups: Sequence[Group]) -> Section | None:
    """The chart of `vadiff evaluate --gap`, if a single run is shown and was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gap:
        return None
    text = (
        "Measured at the last evaluated checkpoint: loss on images that were trained on, and the optimal loss of the "
        "data set, the lowest that any network can have on them. Training can only reduce the gap between the two."
    )
    return Section("gap", "Gap to the optimal loss", text, charts=[gap_chart(groups[0].first.gap)])


def _gradients(groups: Sequence[Group]) -> Section | None:
    """The charts of `vadiff evaluate --gradients`, if a single run is shown and was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gradients:
        return None
    text = "Measured at the last evaluated checkpoint, on training images, for the trained (raw) weights."
    found = gradient_charts(groups[0].first.gradients)
    return Section("gradients", "Gradients per noise level", text, charts=found)


def _metrics(groups: Sequence[Group]) -> Section | None:
    drawn = [training_charts.metric(groups, name) for name in training_charts.metric_names(groups)]
    if not drawn:
        return None
    text = (
        "Generated images compared with real ones by the features of a network: Inception's, or the one that the name "
        "of the metric tells. Such numbers depend on the number of images, the network and its layer: compare them "
        "only with numbers made in the same way."
    )
    return Section("metrics", "Quality of generated images", text, charts=drawn)


def _samples(groups: Sequence[Group]) -> Section | None:
    strips = []
    for group in groups:
        found = group.first.samples
        if found:
            chosen = sorted({round(place) for place in np.linspace(0, len(found) - 1, min(len(found), _SAMPLE_GRIDS))})
            pictures = [Picture(f"step {found[i][0]:,}", _data_url(found[i][1].read_bytes())) for i in chosen]
            strips.append(Strip(group.label if len(groups) > 1 else "", pictures))
    if not strips:
        return None
    text = (
        "Every grid starts from the same noise, so that one cell can be followed through training and across runs. "
        "Look for broken or smeared structures, and for cells that look alike."
    )
    return Section("samples", "Generated images over training", text, strips=strips)


def title_of(groups: Sequence[Group]) -> str:
    """Title of the page about these groups."""
    dataset = str(groups[0].first.config.get("dataset", "")).replace("_", " ")
    if len(groups) == 1:
        return f"Training on {dataset}: {groups[0].first.config['weighting'].replace('_', ' ')} weighting"
    return f"{len(groups)} ways to train on {dataset}, compared"


def _held_out_of_train(groups: Sequence[Group]) -> str:
    """Numbers of training images held out, for data sets without a test part; empty if all have one."""
    numbers = {group.first.held_out_number for group in groups if group.first.held_out_is_test is False}
    return " or ".join(f"{number:,}" for number in sorted(numbers - {None}, key=str))


def lead_of(groups: Sequence[Group]) -> str:
    """How many runs, of how many steps, and what is compared."""
    configs = [run.config for group in groups for run in group.runs]
    processes = [each.upper() if each == "edm" else each.replace("_", " ") for each in _different(configs, "process")]
    text = (
        f"{len(configs)} run{'s' if len(configs) > 1 else ''} of {_listed(configs, 'steps')} steps with "
        f"{_listed(configs, 'batch_size')} images each, {' and '.join(processes)} objective."
    )
    if len(groups) > 1:
        text += f" Compared: {'; '.join(group.label for group in groups)}. Each is compared with {groups[0].label}."
    return text


def _different(configs: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return sorted({config[name] for config in configs})


def _listed(configs: Sequence[dict[str, Any]], name: str) -> str:
    """120 or, of runs that differ, 120, 200 and 300."""
    numbers = [f"{number:,}" for number in _different(configs, name)]
    return " and ".join(filter(None, [", ".join(numbers[:-1]), numbers[-1]]))


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
