"""`vadiff report`: one self-contained HTML page about runs, and its figures as files."""

import base64
import importlib.resources
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..extras import import_extra
from . import charts, held_out_charts
from .magnitudes import magnitudes_svg
from .runs import Group, History
from .style import Chart, all_nan_is_no_value

_SAMPLE_GRIDS = 6  # per group: enough to see the development


@dataclass(frozen=True)
class Table:
    """Text cells; the first of a row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


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
    wide: bool = False  # charts, with their words in them, not grids of small images


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
    """Write the page, and each of its figures as PNG and SVG into a folder of the page's name beside it.

    The page is complete in one file: pictures are inlined, it has no script, and nothing is fetched.

    Args:
        groups: at least one; the others are compared with the first.
        page: file to write, ending in .html; what stood there is replaced.
        title: of the page.

    Returns:
        The files of the figures.

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
        held_out_is_from_train=any(group.first.held_out_is_test is False for group in groups),
        sections=[{**vars(section), "blocks": _blocks(section.charts)} for section in sections],
        settings=_settings(groups),
        footer=f"Made by vadiff {__version__} from {paths}",
    )
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in (chart for section in sections for chart in section.charts):
        for kind in ("png", "svg"):
            files.append(folder / f"{chart.name}.{kind}")
            files[-1].write_bytes(chart.picture(kind, described=True))
    partial = page.with_name(page.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(page)
    return files


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """The parts of the page for which the runs have something to show."""
    found = [_overview(groups), _noise_levels(groups), _over_training(groups), _curves(groups)]
    found.append(_magnitudes(groups))
    found += [_held_out(groups), _gap(groups), _gradients(groups), _metrics(groups), _samples(groups)]
    return [section for section in found if section is not None]


def _blocks(found: Sequence[Chart]) -> list[dict[str, Any]]:
    """Charts of one kind side by side under one caption."""
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
        "Where each run stands at its last logged step. Values with ± are mean and standard deviation over seeds."
        if _several_seeds(groups)
        else "Where each run stands at its last logged step.",
        table=_overview_table(groups),
    )


def _noise_levels(groups: Sequence[Group]) -> Section:
    top = charts.base_loss_top(groups)
    section = Section(
        "noise-levels",
        "Noise level by noise level",
        "What training looked like at each noise level at the end. All of it comes from statistics of the training "
        "loss itself, with recent samples counting most.",
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
        "How it came about",
        "Each column of a picture is one moment of training, each row one noise level. All pictures of a kind share "
        "their colours and axes.",
    )
    for what in (spread, "weights"):
        limits = charts.heatmap_limits(groups, what)
        shown = charts.changing(groups) if what == "weights" else groups
        section.charts += [charts.heatmap(group, what, limits, spans) for group in shown]
    return section


def _curves(groups: Sequence[Group]) -> Section:
    section = Section("curves", "Training curves")
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
    if any(np.isfinite(run.scalars.get("grad_norm", np.nan)).any() for group in groups for run in group.runs):
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
    """Where runs have logged them (`log_rms`): the first run of each group."""
    runs = {group.label: group.first.magnitudes for group in groups if group.first.magnitudes}
    if not runs:
        return None
    text = (
        "Root mean square per layer. Look for weights that grow, which makes the same update count less and less, and "
        "for activations that drift apart."
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
    """The picture of `vadiff evaluate --gap`, where one run is shown that was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gap:
        return None
    pictures = [Picture("", _data_url(file.read_bytes())) for file in groups[0].first.gap]
    text = (
        "Measured at the last evaluated checkpoint: loss on images that were trained on, and the optimal loss of the "
        "data set, the lowest that any network can have there. Only what lies between the two can still be won."
    )
    return Section("gap", "What is left to learn", text, strips=[Strip("", pictures, wide=True)])


def _gradients(groups: Sequence[Group]) -> Section | None:
    """The pictures of `vadiff evaluate --gradients`, where one run is shown that was measured."""
    if len(groups) > 1 or len(groups[0].runs) > 1 or not groups[0].first.gradients:
        return None
    pictures = [Picture("", _data_url(file.read_bytes())) for file in groups[0].first.gradients]
    text = "Measured at the last evaluated checkpoint, on training images, for the weights that are trained."
    return Section("gradients", "How noise levels pull at the network", text, strips=[Strip("", pictures, wide=True)])


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
        "Every grid starts from the same noise, so that one place can be followed through training and across runs. "
        "Look for broken or smeared structures, and for places that look alike."
    )
    return Section("samples", "Generated images over training", text, strips=strips)


def _overview_table(groups: Sequence[Group]) -> Table:
    values: list[tuple[str, Callable[[History], float | None], Callable[[float], str]]] = [
        ("steps", lambda run: run.step[-1], _whole),
        ("images seen", lambda run: run.images[-1], _whole),
        ("training base loss", lambda run: _scalar(run, "base_loss"), number),
        ("held-out loss (EMA)", _final_held_out, number),
        *[(charts.spoken_metric(name), _final_metric(name), number) for name in charts.metric_names(groups)],
        ("samples skipped", lambda run: _scalar(run, "skipped_samples"), _whole),
        ("steps clipped", lambda run: _scalar(run, "clipped_share"), _percent),
        ("images / s", lambda run: _median(run, "images_per_second"), _whole),
        ("time", lambda run: _scalar(run, "seconds"), _duration),
        ("peak memory", lambda run: _scalar(run, "memory_bytes"), _bytes),
    ]
    rows = [["seeds", *(str(len(group.runs)) for group in groups)]] if _several_seeds(groups) else []
    for name, value_of, spoken in values:
        cells = [cell([value_of(run) for run in group.runs], spoken) for group in groups]
        if any(cells):
            rows.append([name, *(cell or "–" for cell in cells)])
    return Table(["", *(group.label for group in groups)], rows)


def cell(values: Sequence[float | None], spoken: Callable[[float], str]) -> str:
    """Mean of the runs, with ± where there are several and they differ; empty without a value."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    if not known:
        return ""
    if len(known) == 1 or max(known) == min(known) or spoken is not number:
        return spoken(float(np.mean(known)))
    mean, spread = float(np.mean(known)), float(np.std(known, ddof=1))
    decimals = max(0, 1 - math.floor(math.log10(spread)))  # two digits of the spread, and the mean to the same place
    return f"{mean:,.{decimals}f} ± {spread:,.{decimals}f}"


def _settings(groups: Sequence[Group]) -> Table:
    names = sorted({name for group in groups for name in group.first.config})

    def setting(group: Group, name: str) -> str:
        return ", ".join(dict.fromkeys(_plain(run.config.get(name)) for run in group.runs))

    rows = [[name, *(setting(group, name) for group in groups)] for name in names]
    return Table(["setting", *(group.label for group in groups)], rows)


def _title(groups: Sequence[Group]) -> str:
    dataset = str(groups[0].first.config.get("dataset", "")).replace("_", " ")
    if len(groups) == 1:
        return f"Training on {dataset}: {groups[0].first.config['weighting'].replace('_', ' ')} weighting"
    return f"{len(groups)} ways to train on {dataset}, compared"


def _lead(groups: Sequence[Group]) -> str:
    config = groups[0].first.config
    runs = sum(len(group.runs) for group in groups)
    text = (
        f"{runs} run{'s' if runs > 1 else ''} of {config['steps']:,} steps with {config['batch_size']} images each, "
        f"{config['process'].upper() if config['process'] == 'edm' else config['process']} objective."
    )
    if len(groups) > 1:
        text += (
            f" Compared: {'; '.join(group.label for group in groups)}. The others are held against {groups[0].label}."
        )
    return text


def _notes(groups: Sequence[Group]) -> list[str]:
    """What must be said before anything is read from the charts."""
    notes = []
    for group in groups:
        for run in group.runs:
            if run.step[-1] < run.config["steps"]:
                notes.append(f"{run.name} is at step {run.step[-1]:,} of {run.config['steps']:,}: not finished.")
            if not run.held_out:
                notes.append(f"{run.name} was not measured on held-out images yet: that part is left out.")
    fewest = min(len(group.runs) for group in groups)
    if len(groups) > 1 and fewest < 10:
        seeds = "one seed" if fewest == 1 else f"{fewest} seeds"
        notes.append(
            f"Differences between runs rest on {seeds} here. Small ones may be chance; nothing can be said about "
            "the spread over seeds from fewer than ten."
        )
    return notes


def _final_held_out(run: History) -> float | None:
    return held_out_charts.level_mean(run.held_out[-1][1]["loss_ema"]) if run.held_out else None


def _final_metric(name: str) -> Callable[[History], float | None]:
    return lambda run: run.evaluation[-1][1].get(name) if run.evaluation else None


def _scalar(run: History, name: str) -> float | None:
    values = run.scalars.get(name)
    return None if values is None else float(values[-1])


def _median(run: History, name: str) -> float | None:
    """Over training without the first entry, in which everything was warmed up."""
    values = run.scalars.get(name)
    if values is None:
        return None
    with all_nan_is_no_value():
        return float(np.nanmedian(values[1:] if len(values) > 1 else values))


def _several_seeds(groups: Iterable[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _data_url(content: bytes, kind: str = "svg+xml") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
