"""The page of `vadiff report` as a browser shows it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vadiff.trainer.report import Group, page, write_report


@pytest.fixture(scope="module")
def report_page(report_groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compares `report_groups`."""
    html = tmp_path_factory.mktemp("page") / "report.html"
    write_report(report_groups, html)
    return html


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


def opened(browser: Any, html: Path) -> Any:
    """The browser with the page in it, loaded unless it is there already."""
    if browser.current_url != html.as_uri():
        browser.get(html.as_uri())
    return browser


def inside(browser: Any, chart: str, selector: str) -> list[str]:
    """Texts of the elements in a chart."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", f"#chart-{chart} {selector}"
    )


def until(browser: Any, condition: Callable[[], Any]) -> Any:
    """What a condition returns once it is true; plotly draws what it is asked for after the event."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda _: condition())


def emulate(browser: Any, mode: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_page_opens_without_errors_missing_pictures_or_requests(
    browser: Any, report_groups: list[Group], report_page: Path
) -> None:
    assert troubles(browser, report_page) == []
    assert browser.execute_script("return document.images.length") == sum(
        len(group.first.samples) for group in report_groups
    )
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].filter(e => e.querySelector('.main-svg')).map(e => e.id)"
    )
    charts = [chart for section in page.sections_of(report_groups) for chart in section.charts]
    assert drawn == [f"chart-{chart.name}" for chart in charts]
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(links) >= 6
    assert all(browser.execute_script("return !!document.querySelector(arguments[0])", link) for link in links)
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title || e.getAttribute('rel'))"
    )
    assert "Zoom in" in buttons
    assert not any(word in button for button in buttons for word in ("Share", "loud", "Edit"))  # they would send data


def test_pointer_shows_the_values_of_all_groups(browser: Any, report_groups: list[Group], report_page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    area = opened(browser, report_page).find_element("css selector", "#chart-base-loss .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    ActionChains(browser).move_to_element(area).perform()
    title, *rows = until(browser, lambda: inside(browser, "base-loss", ".hoverlayer text"))
    shown = dict(row.split(" : ") for row in rows)
    run = report_groups[0].first
    place = int(np.abs(run.centers - float(title.removeprefix("λ = ").replace("−", "-"))).argmin())
    assert list(shown) == ["σ", "constant", "variance aware"]
    assert float(shown["σ"]) == pytest.approx(np.exp(-0.5 * run.centers[place]), rel=5e-3)
    assert float(shown["constant"]) == pytest.approx(run.mean[-1][place], rel=1e-3)


def test_legend_hides_a_group_and_its_band(browser: Any, report_page: Path) -> None:
    opened(browser, report_page)
    assert inside(browser, "base-loss", ".infolayer .legendtext") == ["constant", "variance aware"]
    shown = "return document.querySelector('#chart-base-loss').data.map(t => t.name + (t.fill ? ' band' : ''))"
    assert "variance aware band" in browser.execute_script(shown)
    visible = "return document.querySelectorAll('#chart-base-loss .scatterlayer .trace').length"
    before = browser.execute_script(visible)
    toggle = browser.find_elements("css selector", "#chart-base-loss .infolayer .legendtoggle")[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", toggle)
    toggle.click()
    until(browser, lambda: browser.execute_script(visible) == before - 2)  # line and band
    toggle = browser.find_elements("css selector", "#chart-base-loss .infolayer .legendtoggle")[1]
    toggle.click()
    until(browser, lambda: browser.execute_script(visible) == before)


def test_page_follows_the_readers_dark_and_light_mode(browser: Any, report_page: Path) -> None:
    opened(browser, report_page)
    colors = (
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
        "...['.xtick text', '.legendtext', '.ytitle'].map(s => "
        "getComputedStyle(document.querySelector('#chart-base-loss ' + s)).fill)]"
    )
    for mode, dark in (("dark", True), ("light", False)):
        emulate(browser, mode)

        def follows(dark: bool = dark) -> bool:
            found = browser.execute_script(colors)
            ground, *inks = (sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in found)
            return all((ground < 0.2 and ink > 0.8) if dark else (ground > 0.9 and ink < 0.3) for ink in inks)

        until(browser, follows)
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_page_fits_a_phone(browser: Any, report_page: Path) -> None:
    phone = {"width": 400, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(report_page.as_uri())
    width = browser.execute_script("return document.documentElement.scrollWidth")
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(e => [e.getBoundingClientRect().left, e.clientWidth, "
        "e.querySelector('.main-svg').clientWidth])"
    )
    tables = browser.execute_script(
        "return [...document.querySelectorAll('.table')].filter(e => e.clientWidth)"
        ".map(e => [e.clientWidth, e.scrollWidth, getComputedStyle(e).overflowX])"
    )
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.childNodes.length && e.textContent.trim() && "
        "e.getClientRects().length && !['SCRIPT', 'STYLE', 'g', 'svg'].includes(e.tagName))"
        ".map(e => [parseFloat(getComputedStyle(e).fontSize), e.textContent])"
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 400
    assert len({left for left, *_ in charts}) == 1  # one column
    assert all(300 < drawn <= box for _, box, drawn in charts)
    assert all(inner <= 400 and (outer <= inner or overflow == "auto") for inner, outer, overflow in tables)
    assert tables[0][1] > 400  # the table is wider than the phone, and its box scrolls
    assert len(sizes) > 100
    assert [(size, text) for size, text in sizes if size < 12] == []


def test_page_without_javascript_has_its_tables_and_says_why_not_its_charts(browser: Any, report_page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(report_page.as_uri())
    text = browser.find_element("css selector", "main").text
    boxes = [box.is_displayed() for box in browser.find_elements("css selector", ".chart")]
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    browser.get("about:blank")
    assert "The charts need JavaScript" in text
    assert "held-out x0 loss" in text
    assert "difference from constant" in text
    assert boxes
    assert not any(boxes)


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
