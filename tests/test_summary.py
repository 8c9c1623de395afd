"""plot, summary and log_to of a criterion: what a person and an experiment tracker get to see of it."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vadiff
from vadiff.bands import bands_of
from vadiff.extras import MissingExtraError, install_command

Seen = tuple[vadiff.DiffusionLoss, np.ndarray, np.ndarray]


@pytest.fixture
def seen() -> Seen:
    """A criterion that forgets nothing, the log-SNR [N] it saw and the losses [N], over five orders of magnitude."""
    criterion = vadiff.DiffusionLoss(bins=16, log_snr_range=(-8, 8), half_life=math.inf)
    log_snr = torch.rand(400) * 11 - 6  # -6 to 5
    losses = torch.exp(-log_snr) * (1 + torch.rand(400))
    for part in torch.arange(400).split(50):
        criterion.reweight(losses[part], log_snr[part])
    return criterion, log_snr.double().numpy(), losses.double().numpy()


@pytest.fixture
def pyplot() -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_bands_hold_the_moments_of_the_samples_in_them(seen: Seen) -> None:
    criterion, log_snr, losses = seen
    bands = bands_of(criterion, 5)  # 16 bins: one band has four of them
    edges = bands.edges.numpy()
    np.testing.assert_allclose(edges, [-8, -4, -1, 2, 5, 8])
    for i in range(4):
        inside = losses[(log_snr >= edges[i]) & (log_snr < edges[i + 1])]
        assert bands.samples[i] == len(inside)
        np.testing.assert_allclose(bands.mean[i], inside.mean(), rtol=1e-6)
        np.testing.assert_allclose(bands.std[i], inside.std(ddof=1), rtol=1e-6)
    assert bands.samples[4] == 0
    assert bands.mean[4].isnan()
    assert bands.weight[4].isnan()


def test_weight_of_a_band_is_that_of_its_samples(seen: Seen) -> None:
    criterion, _, _ = seen
    count, weights = criterion.statistics.count[4:8], criterion.weights[4:8].double()
    bands = bands_of(criterion, 4)
    torch.testing.assert_close(bands.weight[1], (count * weights).sum() / count.sum())


@pytest.mark.parametrize("bands", [0, -1, 2.0, True])
def test_a_number_of_bands_that_is_none_is_refused(seen: Seen, bands: Any) -> None:
    with pytest.raises(ValueError, match=r"bands is .*, expected a positive integer"):
        seen[0].summary(bands)


def test_summary_has_a_line_for_each_band_with_samples(seen: Seen) -> None:
    criterion, log_snr, losses = seen
    title, header, *lines, verdict = criterion.summary(bands=8).splitlines()
    assert "VarianceAware" in title
    assert "400 samples" in title
    assert header.split() == ["log-SNR", "samples", "mean", "std", "std/mean", "weight"]
    assert len(lines) == 6  # -6 to 6, of which the last is half empty
    assert verdict.startswith("verdict: ")
    inside = losses[(log_snr >= -2) & (log_snr < 0)]
    low, _, high, share, mean, std, relative, _ = lines[2].split()
    assert (low, high) == ("-2", "0")
    assert share == f"{len(inside) / 400:.1%}"
    assert float(mean) == pytest.approx(inside.mean(), rel=1e-3)
    assert float(std) == pytest.approx(inside.std(ddof=1), rel=1e-3)
    assert float(relative) == pytest.approx(inside.std(ddof=1) / inside.mean(), abs=0.006)


def test_summary_counts_what_was_skipped(seen: Seen) -> None:
    criterion, _, _ = seen
    assert "skipped" not in criterion.summary()
    criterion.reweight(torch.tensor([math.nan, 1.0]), torch.zeros(2))
    assert "skipped: 1 samples with a NaN log-SNR or a non-finite loss or weight" in criterion.summary()


def test_summary_of_weights_that_depend_on_the_batch_has_a_dash() -> None:
    criterion = vadiff.DiffusionLoss("loss_zscore")
    criterion.reweight(torch.ones(4), torch.zeros(4))
    assert criterion.summary().splitlines()[-2].split()[-1] == "-"


def test_summary_of_an_untrained_criterion_says_so() -> None:
    assert "no samples recorded yet" in vadiff.DiffusionLoss().summary()


def test_summary_and_plot_of_non_finite_losses_alone_say_so(pyplot: Any) -> None:
    criterion = vadiff.DiffusionLoss()
    criterion(torch.full((4, 3), torch.nan, requires_grad=True), torch.zeros(4, 3), log_snr=torch.zeros(4))
    assert "no samples recorded: all 4 were non-finite, in loss, weight or log-SNR" in criterion.summary()
    assert "no samples recorded yet" not in criterion.summary()
    loss_axes, _ = criterion.plot()
    assert "all 4 were non-finite" in loss_axes.texts[0].get_text()


def test_looking_changes_nothing(seen: Seen, pyplot: Any) -> None:
    criterion, _, _ = seen
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.plot()
    criterion.summary()
    assert all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())


def test_logging_starts_a_new_level_free_mean_and_changes_nothing_else(seen: Seen) -> None:
    criterion, _, _ = seen
    before = copy.deepcopy(criterion)
    criterion.log_to(lambda values, step: None, 1)
    assert float(before.level_free_loss) == float(criterion.level_free_loss)
    for name, value in before.state_dict().items():
        assert torch.equal(criterion.state_dict()[name], value)


def test_plot_shows_mean_and_weight_of_the_bins_that_have_samples(seen: Seen, pyplot: Any) -> None:
    criterion, _, _ = seen
    loss_axes, weight_axes = criterion.plot()
    filled = (criterion.statistics.count > 0).numpy()
    assert 0 < filled.sum() < 16
    x, y = loss_axes.lines[0].get_data()
    np.testing.assert_allclose(x, criterion.bin_centers.numpy()[filled])
    np.testing.assert_allclose(y, criterion.statistics.mean.numpy()[filled])
    np.testing.assert_allclose(weight_axes.lines[-1].get_ydata(), criterion.weights.numpy()[filled], rtol=1e-6)
    assert loss_axes.get_yscale() == "log"  # losses over orders of magnitude
    assert loss_axes is not weight_axes
    assert "log-SNR" in weight_axes.get_xlabel()
    assert "nats" in weight_axes.get_xlabel()
    assert "base loss" in loss_axes.get_ylabel()
    assert "weight" in weight_axes.get_ylabel()


def test_the_band_of_the_plot_is_one_standard_deviation_each_way(seen: Seen, pyplot: Any) -> None:
    criterion, _, _ = seen
    (band,) = criterion.plot()[0].collections
    filled = criterion.statistics.count > 0
    top = (criterion.statistics.mean + criterion.statistics.variance.sqrt())[filled]
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(top.max().item())


# adaptive, a function of log-SNR, a head, and those that know no weight of a level
@pytest.mark.parametrize("weighting", ["loss_level", vadiff.weighting.MinSNR(), "learned", "gaussian", "loss_zscore"])
@pytest.mark.parametrize("samples", [0, 1, 40])
def test_every_kind_of_weighting_can_be_looked_at_with_and_without_samples(
    weighting: Any, samples: int, pyplot: Any, tmp_path: Path
) -> None:
    criterion = vadiff.DiffusionLoss(weighting)
    if samples:
        criterion.reweight(torch.rand(samples), torch.randn(samples))
    loss_axes, _ = criterion.plot()
    loss_axes.figure.savefig(tmp_path / "plot.svg")
    assert ("no samples" in " ".join(text.get_text() for text in loss_axes.texts)) is (samples == 0)
    assert type(criterion.weighting).__name__ in criterion.summary()
    logged: dict[str, float] = {}
    criterion.log_to(lambda values, step: logged.update(values), 1)
    assert all(math.isfinite(value) for value in logged.values())


def test_negative_losses_are_drawn_too(pyplot: Any, tmp_path: Path) -> None:
    criterion = vadiff.DiffusionLoss("constant")
    criterion.reweight(torch.linspace(-5, 100, 20), torch.linspace(-4, 4, 20))
    loss_axes, _ = criterion.plot()
    assert loss_axes.get_yscale() == "linear"
    loss_axes.figure.savefig(tmp_path / "plot.svg")


def test_plot_takes_axes_of_the_caller(seen: Seen, pyplot: Any) -> None:
    figure, panels = pyplot.subplots(2)
    assert seen[0].plot(panels) == tuple(panels)
    figure, panel = pyplot.subplots()
    loss_axes, weight_axes = seen[0].plot(panel)
    assert loss_axes is panel
    assert weight_axes.figure is figure
    assert len(pyplot.get_fignums()) == 2  # none of its own


@pytest.mark.parametrize("ax", [3, "left", [1, 2, 3]], ids=str)
def test_plot_onto_anything_else_is_refused(seen: Seen, ax: Any, pyplot: Any) -> None:
    with pytest.raises(TypeError, match="expected matplotlib axes, a pair of them, or None"):
        seen[0].plot(ax)


def test_plot_without_matplotlib_names_the_extra(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("report"))):
        seen[0].plot()


def logged_to(criterion: vadiff.DiffusionLoss, make: Callable[[list[Any]], Any], **options: Any) -> list[Any]:
    calls: list[Any] = []
    criterion.log_to(make(calls), 7, **options)
    return calls


class _Logs:
    """Weights & Biases' and Accelerate's signature."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append((values, step))


class _LogsMetrics:
    """That of Lightning's loggers, MLflow and Comet."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((metrics, step))


@pytest.mark.parametrize(
    "make",
    [_Logs, _LogsMetrics, lambda calls: lambda values, step: calls.append((values, step))],
    ids=["log", "log_metrics", "function"],
)
def test_trackers_get_every_band_with_samples_by_name(seen: Seen, make: Callable[[list[Any]], Any]) -> None:
    criterion, log_snr, losses = seen
    ((values, step),) = logged_to(criterion, make, prefix="noise", bands=8)
    assert step == 7
    bands = [f"log_snr_{low}_to_{low + 2}" for low in range(-6, 6, 2)]
    names = ("base_loss", "std", "relative_std", "weight", "share")
    assert set(values) == {f"noise/{name}/{band}" for name in names for band in bands} | {
        "noise/samples", "noise/skipped", "noise/level_free_loss"
    }  # fmt: skip
    assert values["noise/samples"] == 400.0
    assert all(type(value) is float for value in values.values())
    inside = losses[(log_snr >= 2) & (log_snr < 4)]
    assert values["noise/base_loss/log_snr_2_to_4"] == pytest.approx(inside.mean())
    assert values["noise/share/log_snr_2_to_4"] == pytest.approx(len(inside) / 400)
    assert sum(value for name, value in values.items() if "/share/" in name) == pytest.approx(1.0)


def test_an_untrained_criterion_logs_that_nothing_was_skipped() -> None:
    assert logged_to(vadiff.DiffusionLoss(), _Logs) == [({"vadiff/samples": 0.0, "vadiff/skipped": 0.0}, 7)]


def test_a_summary_writer_gets_scalars_a_picture_and_a_histogram(seen: Seen, tmp_path: Path, pyplot: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    criterion, log_snr, _ = seen
    with SummaryWriter(tmp_path) as writer:
        criterion.log_to(writer, 7, bands=8)
    assert pyplot.get_fignums() == []
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert len(tags["scalars"]) == 5 * 6 + 3  # with the names as they were given
    (event,) = events.Scalars("vadiff/base_loss/log_snr_-6_to_-4")
    assert (event.step, event.value) == (7, pytest.approx(bands_of(criterion, 8).mean[1].item()))
    assert events.Images("vadiff/noise_levels")[0].step == 7
    (histogram,) = events.Histograms("vadiff/log_snr")
    assert histogram.histogram_value.num == 400
    assert histogram.histogram_value.sum / 400 == pytest.approx(log_snr.mean(), abs=0.5)  # within a bin


def test_a_summary_writer_without_matplotlib_gets_the_numbers(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[str] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append(name)

        def add_figure(self, name: str, figure: Any, step: int) -> None:
            raise AssertionError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    writer = Writer()
    seen[0].log_to(writer, 7)
    assert "vadiff/skipped" in writer.scalars


def test_accelerate_takes_it(seen: Seen, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    calls: list[Any] = []

    class Tracker(GeneralTracker):
        name = "mine"
        requires_logging_directory = False
        tracker = None

        def log(self, values: dict[str, float], step: int | None, **options: Any) -> None:
            calls.append((values, step))

    accelerator = Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("project")
    seen[0].log_to(accelerator, 7)
    assert calls[0][1] == 7
    assert "vadiff/skipped" in calls[0][0]


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (3, "writer is a int, expected a SummaryWriter, something with"),
        (torch.nn.Linear(1, 1), r"writer is a module \(Linear\): pass its tracker, in Lightning self.logger"),
        (None, "writer is a NoneType"),
    ],
)
def test_what_cannot_log_is_refused(seen: Seen, writer: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        seen[0].log_to(writer, 7)


@pytest.mark.parametrize("step", [None, 1.5, True, "7"])
def test_a_step_that_is_no_integer_is_refused_before_anything_is_written(seen: Seen, step: Any) -> None:
    calls: list[Any] = []
    with pytest.raises(TypeError, match=r"step is .*, expected an integer"):
        seen[0].log_to(_Logs(calls), step)
    assert calls == []


def test_importing_vadiff_imports_no_matplotlib() -> None:
    code = "import sys, vadiff; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
