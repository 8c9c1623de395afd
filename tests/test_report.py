"""vadiff.trainer.report and `vadiff report`: runs as groups, the charts, and the page as a browser sees it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from vadiff.errors import RunError
from vadiff.trainer.cli import main
from vadiff.trainer.report import Group, charts, group_runs, held_out_charts, overview, page, read_history, write_report
from vadiff.trainer.report.style import line
from vadiff.training import open_run


@pytest.fixture(scope="module")
def make_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the trained run under a name, with other values in its config."""

    def make(name: str, **fields: object) -> Path:
        path = shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / name)
        config = yaml.safe_load((path / "config.yaml").read_text())
        (path / "config.yaml").write_text(yaml.safe_dump(config | fields))
        return path

    return make


@pytest.fixture(scope="module")
def groups(make_run: Callable[..., Path]) -> list[Group]:
    """Two weightings, the second with two seeds; FID at two steps of each."""
    paths = [make_run("a", weighting="constant"), make_run("b"), make_run("c", seed=1)]
    for number, path in enumerate(paths):
        for step in (2, 4):
            folder = path / "evaluation" / f"step-{step}"
            folder.mkdir(parents=True)
            metrics = {"fid-768": 20.0 / step + number, "kid_std": 0.1}
            (folder / "metrics.json").write_text(json.dumps({"images_seen": 64 * step, "metrics": metrics}))
    return group_runs([read_history(open_run(path)) for path in paths])


@pytest.fixture(scope="module")
def report_page(groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compares `groups`."""
    html = tmp_path_factory.mktemp("page") / "report.html"
    write_report(groups, html)
    return html


def grouped(*paths: Path) -> list[tuple[str, list[str]]]:
    """(label, names of its runs) of each group."""
    groups = group_runs([read_history(open_run(path)) for path in paths])
    return [(group.label, [run.name for run in group.runs]) for group in groups]


def test_runs_that_differ_in_their_seed_only_are_one_group(make_run: Callable[..., Path]) -> None:
    paths = make_run("two", seed=2), make_run("fixed", weighting="constant"), make_run("one", seed=1, device="auto")
    assert grouped(*paths) == [("variance aware", ["one", "two"]), ("constant", ["fixed"])]


def test_run_of_version_0_1_is_in_the_group_of_a_new_one(make_run: Callable[..., Path]) -> None:
    """Its config lacks the fields that came since, prediction among them."""
    new, old = make_run("new"), make_run("old", seed=1)
    config = yaml.safe_load((old / "config.yaml").read_text())
    for name in ("prediction", "timesteps", "zero_terminal_snr", "ema_rampup", "warmup_from_zero"):
        del config[name]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    twins = [make_run(f"twin-{run.name}", weighting="table", table=str(run)) for run in (new, old)]
    assert grouped(new, old) == [("new", ["new", "old"])]
    assert [names for _, names in grouped(*twins)] == [["twin-new", "twin-old"]]


def test_group_is_labelled_by_the_fields_that_differ(make_run: Callable[..., Path]) -> None:
    paths = make_run("a", learning_rate=1e-3), make_run("b", learning_rate=2e-3), make_run("c", learning_rate=2e-3)
    assert grouped(*paths) == [("learning rate 0.001", ["a"]), ("learning rate 0.002", ["b", "c"])]
    assert grouped(paths[0]) == [("a", ["a"])]


def test_run_with_the_table_of_another_counts_by_the_others_settings(make_run: Callable[..., Path]) -> None:
    one, two = make_run("one"), make_run("two", seed=1)
    twins = [make_run(f"twin-{other.name}", weighting="table", table=str(other)) for other in (one, two)]
    paths = make_run("plain", weighting="constant"), *twins, make_run("slow", weighting="constant", learning_rate=1e-3)
    assert grouped(*paths) == [
        ("constant", ["plain"]),
        ("table, table of variance aware", ["twin-one", "twin-two"]),
        ("constant, learning rate 0.001", ["slow"]),
    ]


def test_history_reads_null_as_not_known(make_run: Callable[..., Path]) -> None:
    path = make_run("run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert None in lines[0]["statistics"]["mean"]
    lines[1]["grad_norm"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(open_run(path))
    assert history.step.tolist() == [1, 2, 3, 4]
    assert history.images.tolist() == [64, 128, 192, 256]
    assert np.isnan(history.scalars["grad_norm"]).tolist() == [False, True, False, False]
    assert history.mean.shape == history.std.shape == history.weights.shape == (4, 128)
    assert np.isnan(history.mean[0]).any()
    assert history.share.sum() == pytest.approx(1.0)
    assert not history.held_out_is_test
    assert [step for step, _ in history.samples] == [2, 4]


def with_lines(path: Path, *steps: int, scale: float = 1.0) -> Path:
    """Keep the lines of these steps only, and multiply their losses."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [line | {"loss": line["step"] * scale} for line in lines if line["step"] in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path


def test_runs_that_log_at_other_steps_are_averaged_where_both_did(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("a"), 1, 2, 3, 4), with_lines(make_run("b", seed=1, log_every=2), 2, 4, scale=3.0)
    groups = group_runs([read_history(open_run(path)) for path in paths])
    assert charts.group_images(groups[0]).tolist() == [128, 256]
    panel = Figure().subplots()
    charts.curve(groups, "loss", "loss", "loss", "Look here.", "loss").draw(panel)
    assert panel.get_lines()[0].get_ydata().tolist() == [4.0, 8.0]  # of 2 and 6, 4 and 12
    assert charts.log_values(groups[0], "mean").shape == (2, 128)


def test_runs_of_a_group_without_a_common_line_are_named(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("a"), 1, 3), with_lines(make_run("b", seed=1), 2)
    with pytest.raises(RunError, match="have no line of metrics at the same number of images"):
        group_runs([read_history(open_run(path)) for path in paths])


def test_run_says_without_its_data_whether_held_out_images_are_a_test_set(make_run: Callable[..., Path]) -> None:
    path = make_run("a", dataset="cifar10", data="gone")
    content = json.loads((path / "data.json").read_text())
    for is_test in (True, False):
        (path / "data.json").write_text(json.dumps(content | {"held_out_is_test": is_test}))
        assert read_history(open_run(path)).held_out_is_test is is_test
    (path / "data.json").unlink()  # a run of before
    assert read_history(open_run(path)).held_out_is_test is None


def test_run_that_has_logged_nothing_is_named(make_run: Callable[..., Path]) -> None:
    path = make_run("run")
    (path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="run has logged nothing yet"):
        read_history(open_run(path))


def all_charts(groups: list[Group]) -> list[Any]:
    return [chart for section in page.sections_of(groups) for chart in section.charts]


def test_every_chart_is_described_named_and_keeps_its_legend_out_of_the_data(groups: list[Group]) -> None:
    found = all_charts(groups) + all_charts(groups[:1])
    assert len({chart.name for chart in found}) > 12
    for chart in found:
        panel = Figure().subplots()
        chart.draw(panel)
        assert "Look " in chart.caption, chart.name
        assert panel.get_xlabel(), chart.name
        assert panel.get_ylabel(), chart.name
        assert panel.get_legend() is None, chart.name  # `Chart.picture` puts it below the axes
        colors = [axes.get_ylabel() for axes in panel.figure.axes[1:]]  # of heatmaps
        assert all(colors), chart.name


def test_comparison_has_relative_spread_and_a_single_run_its_own(groups: list[Group]) -> None:
    several, single = ({chart.name for chart in all_charts(some)} for some in (groups, groups[1:]))
    assert {"relative-std-compared", "relative-std-heatmap-constant", "held-out-ratio"} <= several
    assert "std-heatmap-variance-aware" in single
    assert not any("relative" in name or "compared" in name for name in single)


def test_same_data_give_the_same_file(groups: list[Group]) -> None:
    svg = charts.weights_compared(groups).picture("svg", described=True).decode()
    assert svg.startswith("<?xml")
    assert svg == charts.weights_compared(groups).picture("svg", described=True).decode()


def test_band_over_seeds_says_how_many_and_that_they_are_few(groups: list[Group]) -> None:
    caption = charts.weights_compared(groups).caption
    assert "± 1 standard deviation over 1 to 2 seeds; too few" in caption
    assert "seeds" not in charts.weights_compared(groups[:1]).caption


def test_statistics_of_a_heatmap_are_without_the_adaptive_weight(groups: list[Group]) -> None:
    run = groups[1].first
    [single] = group_runs([run])
    values = charts.log_values(single, "std")
    seen = run.seen & (run.std > 0)
    assert np.allclose(10 ** values[seen], run.std[seen])
    assert np.isnan(values[~run.seen]).all()


def test_ratio_of_held_out_losses_is_paired_by_seed(groups: list[Group]) -> None:
    constant, adaptive = groups
    log_snr, rows = held_out_charts.paired_ratios(adaptive, constant)
    by_hand = adaptive.runs[0].held_out[-1][1]["loss_ema"] / constant.first.held_out[-1][1]["loss_ema"]
    assert log_snr.shape == (12,)
    assert rows.shape == (2, 12)
    assert np.allclose(rows[0], by_hand)


def test_twenty_eight_groups_can_be_told_apart() -> None:
    assert len({line(index) for index in range(28)}) == 28


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


def test_page_shows_its_caveats(report_page: Path) -> None:
    html = report_page.read_text()
    assert "Differences between runs rest on one seed here" in html
    assert "297 of its training images, always the same, were held out instead" in " ".join(html.split())
    assert "FID-768" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "<script" not in html


def test_run_without_held_out_loss_is_shown_without(make_run: Callable[..., Path], groups: list[Group]) -> None:
    path = make_run("unmeasured", weighting="min_snr")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "held_out"} for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [unmeasured] = group_runs([read_history(open_run(path))])
    anchors = [section.anchor for section in page.sections_of([*groups, unmeasured])]
    assert "noise-levels" in anchors
    assert "held-out" not in anchors


def test_unfinished_run_and_hostile_names_are_shown_as_text(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run("<script>alert(1)<", steps=100)
    write_report(group_runs([read_history(open_run(path))]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "is at step 4 of 100: not finished" in html
    assert "<script>" not in html


def test_report_writes_the_page_into_the_run_and_its_charts_as_files(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run("run")
    assert main(["report", str(path), str(path)]) == 0  # the same run twice is one run
    assert str(path / "report.html") in capsys.readouterr().out
    names = {file.name for file in (path / "report").iterdir()}
    assert {"base-loss-run.png", "base-loss-run.svg", "share-of-samples.png", "weights-heatmap-run.svg"} <= names
    assert {Path(name).stem for name in names if name.endswith(".png")} == {
        Path(name).stem for name in names if name.endswith(".svg")
    }


def test_report_refuses_what_is_no_run_or_no_page(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(make_run("run")), "--out", str(tmp_path / "page.pdf")])
    assert "expected a file ending in .html" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, driven through Debian's packages chromium and chromium-driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(30)
    yield chrome
    chrome.quit()


def troubles(browser: Any, html: Path) -> list[str]:
    """Open a page: console messages, pictures that are not there, and requests that left the file."""
    browser.get("about:blank")  # ends the page before, if only Chromium's own of new tabs
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(html.as_uri())
    found = [f"console: {entry['message']}" for entry in browser.get_log("browser")]
    missing = browser.execute_script(
        "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)"
    )
    found += [f"no picture: {alt}" for alt in missing]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url, asked_by = message["params"]["request"]["url"], message["params"]["documentURL"]
            if asked_by == html.as_uri() and not url.startswith("data:") and url != html.as_uri():
                found.append(f"request: {url}")
    return found


def test_page_opens_without_errors_missing_pictures_or_requests(
    browser: Any, groups: list[Group], report_page: Path
) -> None:
    assert troubles(browser, report_page) == []
    pictures = len(all_charts(groups)) + sum(len(group.first.samples) for group in groups)
    assert browser.execute_script("return document.images.length") == pictures
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(links) >= 6
    assert all(browser.execute_script("return !!document.querySelector(arguments[0])", link) for link in links)


def test_page_fits_a_phone(browser: Any, report_page: Path) -> None:
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(report_page.as_uri())
    width = browser.execute_script("return document.documentElement.scrollWidth")
    narrowest = browser.execute_script("return Math.min(...[...document.images].map(i => i.clientWidth))")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 390
    assert narrowest > 150


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<script>console.error('broken')</script>", "console: "),
        ('<img alt="chart" src="data:image/png;base64,AAAA">', "no picture: chart"),
        ('<img alt="chart" src="chart.png">', "request: file://"),
        ('<link rel="stylesheet" href="http://127.0.0.1:9/style.css">', "request: http://127.0.0.1:9"),
    ],
)
def test_the_check_of_the_page_sees_each_fault(browser: Any, tmp_path: Path, body: str, expected: str) -> None:
    html = tmp_path / "page.html"
    html.write_text(f'<!doctype html><link rel="icon" href="data:,">{body}')
    assert any(trouble.startswith(expected) for trouble in troubles(browser, html))


def test_numbers_on_axes_are_plain() -> None:
    assert [charts.number_label(value, 0) for value in (0, 500, 25_000, 1.5e6, 2e9)] == [
        "0", "500", "25k", "1.5M", "2G",
    ]  # fmt: skip
