"""vadiff.trainer.report and `vadiff report`: the charts, the tables and the text of the page."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vadiff.trainer.cli import main
from vadiff.trainer.report import (
    Group,
    History,
    charts,
    from_log,
    group_runs,
    held_out_charts,
    overview,
    page,
    read_history,
    style,
    training_charts,
    write_report,
)
from vadiff.training import open_run


@pytest.fixture(scope="module")
def report_page(report_groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compares `report_groups`."""
    html = tmp_path_factory.mktemp("page") / "report.html"
    write_report(report_groups, html)
    return html


def all_charts(groups: list[Group]) -> dict[str, Any]:
    """The charts of a page by name."""
    return {chart.name: chart for section in page.sections_of(groups) for chart in section.charts}


def lines_of(chart: Any) -> dict[str, Any]:
    """The lines of a chart that the legend can name, by their names."""
    return {trace.name: trace for trace in chart.figure.data if trace.showlegend is not False}


def test_every_chart_says_what_to_look_for_and_names_its_axes_and_values(report_groups: list[Group]) -> None:
    several, single = all_charts(report_groups), all_charts(report_groups[:1])
    assert len(several) >= 14
    for chart in (*several.values(), *single.values()):
        figure = chart.figure
        assert "Look " in chart.caption, chart.name
        assert figure.layout.xaxis.title.text, chart.name
        assert figure.layout.yaxis.title.text, chart.name
        for trace in figure.data:
            assert trace.hovertemplate or trace.hoverinfo == "skip", (chart.name, trace.name)
            assert trace.type != "heatmap" or trace.coloraxis or trace.colorbar.title.text, chart.name


def test_group_has_one_colour_in_all_charts_and_the_legend_hides_its_band_too(report_groups: list[Group]) -> None:
    styles = charts.styles_of(report_groups)
    for chart in all_charts(report_groups).values():
        for trace in chart.figure.data:
            if trace.type == "scatter" and trace.name != "σ" and trace.fill is None:
                label = trace.name.removesuffix(", raw")
                assert trace.line.color == styles[label].color, (chart.name, trace.name)
                assert trace.legendgroup == trace.name
    bands = [trace for trace in charts.base_losses_compared(report_groups).figure.data if trace.fill]
    assert [trace.legendgroup for trace in bands] == ["variance aware"]  # the group with two seeds


def luminance(color: str) -> float:
    """Relative luminance of sRGB, as WCAG 2.1 defines it."""
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_colour_is_seen_on_both_grounds(mode: str) -> None:
    ground = luminance(style.template(mode)["layout"]["hoverlabel"]["bgcolor"])
    colors = {style.line(index).color for index in range(7)} | {style.ONLY.color, style.OTHER.color}
    for color in colors | {from_log.shade(place) for place in np.linspace(0, 1, 9)}:
        low, high = sorted((luminance(color), ground))
        assert (high + 0.05) / (low + 0.05) >= 3.0, color


def test_twenty_eight_groups_can_be_told_apart() -> None:
    assert len({style.line(index) for index in range(28)}) == 28


def test_comparison_has_relative_spread_and_a_single_run_its_own(report_groups: list[Group]) -> None:
    several, single = all_charts(report_groups), all_charts(report_groups[1:])
    assert {"relative-std", "relative-std-over-training", "held-out-ratio", "balance"} <= several.keys()
    assert {"std-over-training", "balance"} <= single.keys()
    assert not any("relative" in name for name in single)


def test_balance_is_the_spread_of_the_weighted_loss(report_groups: list[Group]) -> None:
    run = report_groups[0].first
    seen = run.seen[-1]
    expected = (run.weights[-1] * run.std[-1])[seen]
    chart = charts.balance(report_groups)
    drawn = np.array(lines_of(chart)["constant"].y)
    np.testing.assert_allclose(drawn[seen], expected)
    assert np.isnan(drawn[~seen]).all()
    ratio = expected[expected > 0].max() / expected[expected > 0].min()
    assert f"Highest ÷ lowest: constant {ratio:.1f} ×" in chart.caption
    assert f"{ratio:.1f} ×" in [row[1] for row in overview.overview_table(report_groups).rows]


def test_weights_are_told_in_multiples_not_in_logarithms(report_groups: list[Group]) -> None:
    heatmap = training_charts.heatmap(training_charts.changing(report_groups), "weights").figure
    run = report_groups[1].runs
    expected = np.exp(np.log(np.stack([each.weights for each in run])).mean(0)).T
    seen = np.isfinite(heatmap.data[0].z)
    np.testing.assert_allclose(np.array(heatmap.data[0].customdata)[..., 0][seen], expected[seen], rtol=1e-5)
    ticks = heatmap.layout.coloraxis.colorbar
    assert [float(text.removesuffix(" ×")) for text in ticks.ticktext] == pytest.approx(10 ** np.array(ticks.tickvals))
    assert "1 ×" in ticks.ticktext


def test_heat_maps_of_several_groups_are_one_chart_with_a_menu(report_groups: list[Group]) -> None:
    figure = all_charts(report_groups)["relative-std-over-training"].figure
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["constant", "variance aware"]
    assert [trace.visible for trace in figure.data] == [True, False]
    assert list(menu.buttons[1].args[1]) == [False, True]


def test_same_data_give_the_same_page(report_groups: list[Group], report_page: Path, tmp_path: Path) -> None:
    write_report(report_groups, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == report_page.read_bytes()


def test_band_over_seeds_says_how_many_and_that_they_are_few(report_groups: list[Group]) -> None:
    caption = charts.weights_compared(report_groups).caption
    assert "± 1 standard deviation over 1 to 2 seeds; too few" in caption
    assert "seeds" not in charts.weights_compared(report_groups[:1]).caption


def test_statistics_of_a_heatmap_are_without_the_adaptive_weight(report_groups: list[Group]) -> None:
    run = report_groups[1].first
    [single] = group_runs([run])
    values = training_charts.log_values(single, "std")
    seen = run.seen & (run.std > 0)
    assert np.allclose(10 ** values[seen], run.std[seen])
    assert np.isnan(values[~run.seen]).all()


def test_ratio_of_held_out_losses_is_paired_by_seed(report_groups: list[Group]) -> None:
    constant, adaptive = report_groups
    log_snr, rows = held_out_charts.paired_ratios(adaptive, constant)
    by_hand = adaptive.runs[0].held_out[-1][1]["loss_ema"] / constant.first.held_out[-1][1]["loss_ema"]
    assert log_snr.shape == (12,)
    assert rows.shape == (2, 12)
    assert np.allclose(rows[0], by_hand)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "0.5000"),
        ([0.5, 0.5], "0.5000"),
        ([0.5, 0.51], "0.5050 ± 0.0071"),
        ([None], ""),
        ([10.0, 30.0], "20 ± 14"),
    ],
)
def test_table_rounds_to_what_the_spread_allows(values: list[float | None], text: str) -> None:
    assert overview.cell(values, overview.number) == text


def with_values(group: Group, label: str, values: dict[int, float]) -> Group:
    """A group of copies of a run, whose base loss ends at these values, by seed."""

    def copy(seed: int, value: float) -> History:
        run = group.first
        scalars = run.scalars | {"base_loss": np.full(len(run.step), value)}
        return dataclasses.replace(run, config=run.config | {"seed": seed}, scalars=scalars)

    return Group(label, tuple(copy(seed, value) for seed, value in values.items()))


@pytest.mark.parametrize(
    ("values", "cell", "words"),
    [
        ({0: 1.1}, "+10.00 %", "Of one seed there is no uncertainty to give"),
        ({0: 1.1, 1: 2.0}, "+4.88 % (+0.00 % to +10.00 %)", "fewer than five seeds are too few for an interval"),
        ({seed: 2.2 for seed in range(1, 6)}, "+10.00 % [+10.00 %, +10.00 %]", "95 % interval in square brackets"),
        ({0: 0.9, 7: 5.0}, "−10.00 %", "no uncertainty"),  # seed 7 has no partner
        ({7: 5.0}, "", "no seed is the same"),
    ],
)
def test_difference_is_paired_by_seed_and_says_how_sure_it_is(
    report_groups: list[Group], values: dict[int, float], cell: str, words: str
) -> None:
    first = with_values(report_groups[0], "one", {0: 1.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0})
    groups = [first, with_values(report_groups[0], "two", values)]
    table = overview.overview_table(groups)
    assert table.head == ["", "one", "two", "difference from one"]
    (row,) = [row for row in table.rows if row[0] == "training base loss"]
    assert row[3] == cell
    assert words in overview.differences_explained(groups)


def test_distance_is_in_the_table_where_it_was_measured_last(report_groups: list[Group]) -> None:
    (row,) = [row for row in overview.overview_table(report_groups).rows if row[0] == "FID-768"]
    assert row[1:] == ["5.000", "6.50 ± 0.71", "+20.00 %"]
    later = dataclasses.replace(report_groups[0].first, evaluation=[(128, {"fid": 3.0}), (256, {"kid": 0.1})])
    (fid,) = [row for row in overview.overview_table([Group("one", (later,))]).rows if row[0] == "FID"]
    assert fid[1] == "3.000"


def test_page_shows_its_caveats(report_page: Path) -> None:
    html = report_page.read_text()
    assert "Differences between runs rest on one seed here" in html
    assert "297 of its training images, always the same, were held out instead" in " ".join(html.split())
    assert "FID-768" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html.partition("<script>")[0])
    assert html.count("* plotly.js v") == 1  # the library, once


def test_run_without_held_out_loss_is_shown_without(make_run: Callable[..., Path], report_groups: list[Group]) -> None:
    path = make_run("unmeasured", weighting="min_snr")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "held_out"} for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [unmeasured] = group_runs([read_history(open_run(path))])
    anchors = [section.anchor for section in page.sections_of([*report_groups, unmeasured])]
    assert "noise-levels" in anchors
    assert "held-out" not in anchors


def test_unfinished_run_and_hostile_names_are_shown_as_text(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run("<script>alert(1)<", steps=100)
    write_report(group_runs([read_history(open_run(path))]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "is at step 4 of 100: not finished" in html
    assert "<script>alert" not in html


def test_report_writes_one_file_into_the_run(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run("run")
    before = {*path.iterdir()}
    assert main(["report", str(path), str(path)]) == 0  # the same run twice is one run
    assert re.search(r"report\.html   \(\d+ charts\)", capsys.readouterr().out)
    assert {*path.iterdir()} - before == {path / "report.html"}


def test_report_refuses_what_is_no_run_or_no_page(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(make_run("run")), "--out", str(tmp_path / "page.pdf")])
    assert "expected a file ending in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 2.0, [0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2]),
        (0.15, 0.41, [0.15, 0.2, 0.25, 0.3, 0.4]),
        (0.011, 15.0, [0.03, 0.1, 0.3, 1, 3, 10]),
        (1e-5, 1.0, [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_few(low: float, high: float, expected: list[float]) -> None:
    assert style.round_numbers(low, high) == expected
