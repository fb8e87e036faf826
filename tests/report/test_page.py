"""The page holds all it needs, nothing foreign as markup, and lets nothing foreign run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import StorageError
from frostline.report.charts import THEMES, charts_of, concrete, timeline_chart
from frostline.report.figures import csv_text, write_figures
from frostline.report.numbers import Numbers, numbers_of
from frostline.report.page import page, safe_json, write_page
from frostline.report.read import read_runs
from report_records import HOSTILE, hostile_run, large_run, probe, write_run, write_study


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = True
            self.raw.append((dict(attrs) | {"tag": tag}, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            attributes, text = self.raw[-1]
            self.raw[-1] = (attributes, text + data)
        else:
            self.text += data

    @property
    def data(self) -> dict:
        (text,) = [t for a, t in self.raw if a.get("type") == "application/json"]
        return json.loads(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    folder = tmp_path_factory.mktemp("study")
    arms = {"full": [0.8, 0.81, 0.79], "bitfit": [0.83, 0.84, 0.82]}
    write_study(folder, arms)
    points = {"points": [probe("stem", 0), probe("body", 1)], "head_input": None, "commonest": 0.2}
    (folder / "runs/full/seed-0/probes.json").write_text(json.dumps(points))
    return numbers_of(read_runs([folder]))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    folder = tmp_path_factory.mktemp("hostile")
    runs = [hostile_run(folder / "one"), write_run(folder / "two", policy="bitfit", seed=1)]
    return Parsed(page(numbers_of(read_runs(runs))))


def test_the_page_holds_every_chart_with_words_and_a_table(study: Numbers):
    found = Parsed(page(study))
    charts = {chart.name for chart in charts_of(study)}
    assert charts >= {"quality_time", "quality_memory", "overview", "val_accuracy", "time",
                      "saving", "probes", "confusion"}  # fmt: skip
    shown = [a for tag, a in found.elements if "data-chart" in a]
    assert {a["data-chart"] for a in shown} == charts == found.data["charts"].keys()
    assert all(a["role"] == "img" and a["aria-label"] for a in shown)
    tables = [tag for tag, _ in found.elements if tag == "table"]
    assert len(tables) >= len(charts)
    assert study.headline.title in found.text


def test_the_page_asks_nothing_of_any_network(study: Numbers):
    text = page(study)
    found = Parsed(text)
    links = [v for _, a in found.elements for k, v in a.items() if k in ("href", "src", "action")]
    assert all(v is not None and v.startswith(("#", "data:")) for v in links)
    assert not re.search(r"url\(|@import", "".join(t for a, t in found.raw if a["tag"] == "style"))
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "connect-src" not in policy


def test_scripts_and_styles_are_those_that_the_policy_names(study: Numbers):
    found = Parsed(page(study))
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv")) or ""
    run = [text for a, text in found.raw if a.get("type") != "application/json"]
    assert len(run) == 3
    for text in run:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_page_is_small_and_the_same_each_time(study: Numbers):
    text = page(study)
    assert len(text) < 2_000_000
    assert text == page(study)


def test_hostile_names_make_no_markup(hostile: Parsed):
    for tag, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes
        assert not str(attributes.get("href") or "#").startswith("javascript:")
        assert tag != "iframe"
    assert len([tag for tag, _ in hostile.elements if tag == "script"]) == 3
    assert not [tag for tag, _ in hostile.elements if tag == "img"]


def test_hostile_names_are_shown_as_they_are(hostile: Parsed):
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[6], HOSTILE[9]):  # a template's own among them
        assert name in hostile.text
    assert "\\u202e" in hostile.text
    assert "\u202e" not in hostile.text
    assert HOSTILE[0] in hostile.data["strings"]


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_data_cannot_leave_its_script(value):
    text = safe_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    json.loads(text)


def test_an_older_report_is_replaced_and_nothing_else(study: Numbers, tmp_path: Path):
    path = tmp_path / "deep" / "report.html"
    write_page(study, path)
    write_page(study, path)
    path.write_text("my own page")
    with pytest.raises(StorageError, match="no report"):
        write_page(study, path)
    assert path.read_text() == "my own page"
    with pytest.raises(StorageError, match="a folder there"):
        write_page(study, tmp_path)


def test_a_timeline_survives_its_packing(tmp_path: Path):
    numbers = numbers_of(read_runs([large_run(tmp_path / "run", seed=3, groups=6, decisions=30)]))
    packed = Parsed(page(numbers)).data
    (run,), strings = packed["runs"], packed["strings"]
    found = numbers.details[0].timeline
    unpacked = []
    for group, flat in enumerate(run["spans"]):
        starts = [*flat[3::3], run["end"]]
        for place, end in enumerate(starts):
            begin, phase, change = flat[3 * place : 3 * place + 3]
            ratio = run["seen"][group][0][place]
            unpacked.append((strings[run["groups"][group]], begin, end, run["phases"][phase][0],
                             strings[run["changes"][change][3]], ratio))  # fmt: skip
    assert unpacked == [
        (s.group, s.from_step, s.to_step, s.phase.kind, found.changes[s.change].reason,
         float(f"{s.signals['update_ratio']:.4g}"))
        for s in found.spans
    ]  # fmt: skip


def test_of_one_run_only_what_it_has_is_shown(tmp_path: Path):
    run = write_run(tmp_path / "run", finished=False, accuracies=(), decisions=[])
    found = Parsed(page(numbers_of(read_runs([run]))))
    assert "not finished" in found.text
    assert "quality_time" not in found.data["charts"]


# -- charts and files ----------------------------------------------------------------------------


def test_files_hold_no_variable_of_a_page(study: Numbers):
    for chart in charts_of(study):
        assert "var(--" in json.dumps(chart.spec)
        for theme in THEMES:
            assert "var(--" not in json.dumps(concrete(chart.spec, theme))


def test_both_themes_have_the_same_colours_by_name():
    assert THEMES["light"].keys() == THEMES["dark"].keys()


def test_a_chart_of_a_timeline_has_a_row_per_span(study: Numbers):
    found = study.details[0].timeline
    assert len(timeline_chart("t", found).rows) == len(found.spans)


def test_figures_are_written_as_numbers_and_pictures(study: Numbers, tmp_path: Path):
    written = write_figures(study, tmp_path / "figures")
    assert all(path.is_file() for path in written)
    names = {path.relative_to(tmp_path / "figures").as_posix() for path in written}
    assert {"report.json", "runs.csv", "decisions.csv", "quality_time.svg", "quality_time.png",
            "timelines/full-seed-0.svg"} <= names  # fmt: skip
    svg = (tmp_path / "figures/quality_time.svg").read_text()
    assert svg.startswith("<svg")
    assert "bitfit" in svg
    assert "var(--" not in svg
    assert (tmp_path / "figures/quality_time.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "figures/runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 6
    assert lines[0].startswith("name,arm,seed,finished,val_accuracy")
    assert json.loads((tmp_path / "figures/report.json").read_text())["model"] == "timm:net"


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_no_cell_of_a_csv_is_a_formula(cells):
    import csv
    import io

    (_, row) = csv.reader(io.StringIO(csv_text(["h"] * len(cells), [cells])))
    assert len(row) == len(cells)
    assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@"))]
