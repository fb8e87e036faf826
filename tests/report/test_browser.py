"""The page in a real browser: it draws, answers and lets nothing in or out.

Chromium or Chrome must be installed (Debian: ``apt install chromium``), Playwright drives it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from frostline.policy import Decision
from frostline.report.numbers import numbers_of
from frostline.report.page import write_page
from frostline.report.read import read_runs
from report_records import hostile_run, large_run, plan, write_curve, write_run

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs chromium or chrome")
    with sync_api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclass
class Opened:
    """A page and what it did besides being shown."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def quiet(self) -> bool:
        owned = self.page.evaluate("window.owned")
        return not self.said and len(self.requests) == 1 and owned is None


@pytest.fixture
def opened(browser):
    pages = []

    def open_(path: Path, *, scheme: str = "light", size: dict[str, int] = DESK) -> Opened:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        found = Opened(page)
        page.on("console", lambda message: found.said.append(message.text))
        page.on("pageerror", lambda error: found.said.append(str(error)))
        page.on("dialog", lambda dialog: found.said.append(dialog.message))
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("requestfailed", lambda request: found.failures.append(request.failure))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        pages.append(page)
        return found

    yield open_
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    seen = {"update_ratio": {"stem": 0.125, "body": 0.5, "head": 0.75}}
    decisions = [
        Decision(0, plan("stem", "body", reason="the head first")),
        Decision(10, plan("stem", reason="its ratio rose"), signals=seen),
    ]
    write_run(folder / "gradual", policy="gradual", decisions=decisions)
    for seed in (0, 1):
        write_run(folder / f"full-{seed}", policy="full", seed=seed, accuracies=(0.4, 0.7))
    path = folder / "report.html"
    write_page(numbers_of(read_runs([folder])), path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK])
def test_it_draws_every_chart_and_asks_for_nothing(opened, report, scheme, size):
    found = opened(report, scheme=scheme, size=size)
    assert found.quiet(), (found.said, found.requests)
    drawn = "[...document.querySelectorAll('.chart')].map((e) => e.querySelectorAll('path').length)"
    assert all(count > 2 for count in found.page.evaluate(drawn))
    assert found.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert found.page.locator(".chart.failed").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK])
def test_a_learning_curve_is_drawn_with_its_labels(opened, tmp_path, scheme, size):
    few, many = {50: [0.4, 0.42], 100: [0.6, 0.64]}, {50: [0.5, 0.55], 100: [0.55, 0.57]}
    study = write_curve(tmp_path / "study", {"full": few, "linear-probe": many})
    path = tmp_path / "report.html"
    write_page(numbers_of(read_runs([study])), path)
    found = opened(path, scheme=scheme, size=size)
    assert found.quiet(), (found.said, found.requests)
    chart = found.page.locator('[data-chart="by_size"]')
    shown = {text.strip() for text in chart.locator("text").all_text_contents()}
    assert {"full", "linear-probe", "50", "100"} <= shown
    assert found.page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_hovering_a_span_says_what_and_why(opened, report):
    page = opened(report).page
    assert page.locator("#run option:checked").inner_text().startswith("gradual")
    spans = page.locator("#timeline-chart .mark-rect path")
    assert spans.count() == 4
    spans.nth(2).hover()
    tip = page.locator("#tip").inner_text()
    assert "body" in tip
    assert "its ratio rose" in tip
    assert "update_ratio" in tip
    assert "0.5" in tip
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_keyboard_reaches_every_update_and_is_told_its_state(opened, report):
    page = opened(report).page
    page.locator("#at").focus()
    page.keyboard.press("End")
    said = page.locator("#at").get_attribute("aria-valuetext")
    assert said == page.locator("#at-says").inner_text()
    assert "1 of 3 groups frozen" in said
    assert "its ratio rose" in said
    page.keyboard.press("Home")
    assert "the head first" in page.locator("#at-says").inner_text()
    page.locator("#groups-behind summary").click()
    assert "frozen" in page.locator("#groups-now").inner_text()


def test_decisions_are_found_by_group_and_by_reason(opened, report):
    page = opened(report).page
    rows = page.locator("#decision-rows tr")
    assert rows.count() == 2
    page.locator("#find").fill("ROSE")
    assert rows.count() == 1
    assert "unfroze body" in rows.first.inner_text()
    assert page.locator("#found").inner_text() == "1 of 2 decisions"
    rows.first.locator("button").click()
    assert "Update 10" in page.locator("#at-says").inner_text()
    page.locator("#find").fill("stem")
    assert "froze stem, body" in rows.first.inner_text()


def test_another_run_can_be_chosen(opened, report):
    page = opened(report).page
    page.locator("#run").select_option(index=0)
    page.wait_for_function(
        "document.querySelectorAll('#timeline-chart .mark-rect path').length === 3"
    )
    assert "everything trains" in page.locator("#decision-rows").inner_text()


def test_strategies_can_be_hidden_in_all_charts(opened, report):
    page = opened(report).page
    dots = page.locator("[data-chart=quality_time] .points_marks path")
    assert dots.count() == 2
    chip = page.locator(".chip", has_text="full")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert dots.count() == 1
    chip.press("Enter")
    assert dots.count() == 2


def test_the_theme_follows_the_system_until_one_is_chosen(opened, report):
    page = opened(report, scheme="dark").page
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    assert dark != "rgb(255, 255, 255)"
    page.locator("#theme").click()
    assert page.locator("#theme").inner_text() == "Theme: light"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.emulate_media(media="print")
    page.locator("#theme").evaluate("(button) => button.click()")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_it_prints(opened, report, tmp_path: Path):
    text = opened(report).page.pdf(path=tmp_path / "report.pdf")
    assert text.startswith(b"%PDF")
    assert len(text) > 30_000


def test_hostile_names_run_nothing(opened, tmp_path: Path):
    write_run(tmp_path / "other", policy="bitfit", seed=1)
    hostile_run(tmp_path / "hostile")
    path = tmp_path / "report.html"
    write_page(numbers_of(read_runs([tmp_path])), path)
    found = opened(path)
    found.page.locator("#timeline-chart .mark-rect path").nth(3).hover()
    for chip in found.page.locator(".chip").all():
        chip.click()
    found.page.locator("#find").fill("</script>")
    found.page.locator("#at").fill("30")
    assert found.quiet(), (found.said, found.requests)


def test_what_slips_in_all_the_same_is_stopped_by_the_policy(opened, report, tmp_path: Path):
    text = report.read_text(encoding="utf-8")
    image = "<img src='https://example.org/x' onerror='window.owned = 2'>"
    attack = f"<script>window.owned = 1</script>{image}"
    path = tmp_path / "report.html"
    path.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")
    found = opened(path)
    assert found.page.evaluate("window.owned") is None
    (failure,) = found.failures  # the browser tells of the request that it did not make
    assert "BLOCKED_BY_CSP" in failure or failure == "csp"
    assert any("Content Security Policy" in line for line in found.said)


def test_twenty_large_runs_are_a_page_that_opens(opened, tmp_path: Path):
    for seed in range(20):
        large_run(tmp_path / f"run-{seed}", seed=seed)
    path = tmp_path / "report.html"
    write_page(numbers_of(read_runs([tmp_path])), path)
    assert path.stat().st_size < 6_000_000
    found = opened(path)
    assert found.quiet(), (found.said, found.requests)
    assert found.page.locator("#decision-rows tr").count() == 200
    found.page.locator("#more").click()
    assert found.page.locator("#decision-rows tr").count() == 1000
