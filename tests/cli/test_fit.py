"""`frostline fit`, `predict` and `runs` on real files, and every way in which they may fail."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

COMMAND = (sys.executable, "-c", "from frostline.cli import main; main()")
RANDOM = ("--weights", "random")
QUICK = ("--image-size", "32", "--batch-size", "4", "--augment", "none")
#: What a finished run leaves, and nothing else.
WHOLE = {
    ".lock",
    "best",
    "certificate.json",
    "checkpoints",
    "config.yaml",
    "log.txt",
    "metrics.csv",
    "model",
    "predictions.csv",
    "record.jsonl",
    "summary.json",
}


def _pictures(folder: Path, classes: dict[str, int]) -> Path:
    """Class folders of small pictures, one colour per class."""
    random = np.random.default_rng(0)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return _pictures(tmp_path_factory.mktemp("data") / "photos", {"red": 8, "green": 8})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    """A finished run, made once by the command."""
    folder = tmp_path_factory.mktemp("runs") / "runs"
    arguments = ["fit", "timm:test_resnet", photos, "--policy", "gradual:until=50%"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--epochs", "2", "--output", folder / "first", *RANDOM, *QUICK],
        capture_output=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    (folder / "first.out").write_text(done.stdout)
    (folder / "first.err").write_text(done.stderr)
    return folder / "first"


# -- what works ------------------------------------------------------------------------------


def test_a_run_shows_progress_on_stderr_and_its_table_on_stdout(finished):
    err = finished.with_suffix(".err").read_text().splitlines()
    out = finished.with_suffix(".out").read_text()
    assert err[0] == f"run folder {finished}"
    assert "frozen" in err[1]
    assert sum(line.startswith("epoch ") for line in err) == 2
    assert "gradual:until=50%" in out
    assert f"frostline predict {finished} INPUT" in out


def test_a_run_folder_is_whole(finished):
    assert {p.name for p in finished.iterdir()} == WHOLE
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["trained_parameter_share"] < 1
    assert 0 < summary["backward_share"] < 1


def test_a_finished_run_is_left_as_it_is(cli, finished, photos):
    before = (finished / "summary.json").read_bytes()
    arguments = ("fit", "timm:test_resnet", photos, "--policy", "gradual:until=50%")
    done = cli(*arguments, "--epochs", "2", "--output", finished, *RANDOM, *QUICK, "--json")
    assert done.code == 0
    assert json.loads(done.out)["path"] == str(finished)
    assert (finished / "summary.json").read_bytes() == before
    assert "finished already" in done.err


def test_fresh_starts_over_and_keeps_the_earlier_run(cli, photos):
    short = ("--epochs", "1", "--policy", "linear-probe")
    assert _fit(cli, photos, *short).code == 0
    before = Path("out/record.jsonl").read_bytes()
    again = _fit(cli, photos, *short, "--fresh")
    assert again.code == 0
    assert "run folder out" in again.err
    assert Path("out.old-001/record.jsonl").read_bytes() == before
    assert {p.name for p in Path("out").iterdir()} == WHOLE


def test_predict_prints_labels_and_probabilities(cli, finished, photos):
    pictures = [photos / "red/0.png", photos / "green/0.png"]
    done = cli("predict", finished, *pictures, "--json", "--top", "2")
    assert done.code == 0
    found = json.loads(done.out)
    assert [row["input"] for row in found] == list(map(str, pictures))
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert list(row["probabilities"].values()) == sorted(row["probabilities"].values())[::-1]
    table = cli("predict", finished, *pictures).out
    assert table.count(" %") == 2


def test_predict_takes_lines_of_a_file_and_of_stdin(cli, finished, photos, monkeypatch):
    Path("inputs.txt").write_text(f"{photos / 'red/0.png'}\n\n{photos / 'red/1.png'}\n")
    from_file = cli("predict", finished, "@inputs.txt", "--json")
    with Path("inputs.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        from_stdin = cli("predict", finished, "-", "--json")
    assert len(json.loads(from_file.out)) == 2
    assert from_file.out == from_stdin.out


def test_runs_lists_what_is_there(cli, finished):
    assert " first " in cli("runs", finished.parent).out
    assert json.loads(cli("runs", finished.parent, "--json").out)[0]["run"] == "first"


def test_print_config_is_a_configuration_and_says_where_from(cli):
    Path("run.yaml").write_text("model: timm:test_resnet\ndata: photos\nepochs: 3\n")
    done = cli("fit", "--config", "run.yaml", "--lr", "1e-3", "--print-config")
    assert done.code == 0
    assert "epochs: 3  # run.yaml" in done.out
    assert "lr: 0.001  # flag" in done.out
    assert "seed: 0  # default" in done.out
    again = yaml.safe_load(done.out)
    assert (again["model"], again["epochs"]) == ("timm:test_resnet", 3)
    Path("again.yaml").write_text(done.out)
    assert cli("fit", "--config", "again.yaml", "--print-config").code == 0
    assert not Path("runs").exists()


def test_flags_win_over_the_file(cli):
    Path("run.yaml").write_text("model: m\ndata: d\nepochs: 3\n")
    out = cli("fit", "--config", "run.yaml", "--epochs", "7", "--print-config").out
    assert "epochs: 7  # flag" in out


# -- what fails ------------------------------------------------------------------------------


def _failed(done, *, code: int, says: str, run: str = "out") -> None:
    """One message of two or three lines, the code, and nothing that looks like a result."""
    message = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    start = next(i for i, line in enumerate(message) if line.startswith("cannot "))
    assert done.code == code, done.err
    assert says in " ".join(message[start:])
    assert message[start + 1].startswith("  found: ")
    assert len(message) - start <= 3
    assert "Traceback" not in done.err
    assert done.out == ""
    left = {p.name for p in Path(run).iterdir()} if Path(run).exists() else set()
    assert not left & {"summary.json", "model", "certificate.json"}
    assert not [name for name in left if name.startswith(".tmp-")]


def _fit(cli, photos, *more: str | Path, model: str = "timm:test_resnet"):
    weights = () if "--weights" in more else RANDOM
    return cli("fit", model, photos, "--output", "out", *QUICK, *weights, *more)


def test_an_unreadable_picture(cli):
    data = _pictures(Path("data"), {"red": 8, "green": 8})
    (data / "red/0.png").write_bytes(b"no picture")
    _failed(_fit(cli, data), code=1, says="0.png")


def test_an_empty_class(cli):
    data = _pictures(Path("data"), {"red": 8, "green": 8})
    (data / "blue").mkdir()
    _failed(_fit(cli, data), code=1, says="blue")


def test_one_class_only(cli):
    _failed(_fit(cli, _pictures(Path("data"), {"red": 8})), code=1, says="one class only")


def test_a_missing_label(cli):
    Path("data.csv").write_text("text,label\n" + "fine,good\nbad,poor\n" * 10 + "so,\n")
    _failed(_fit(cli, "data.csv"), code=1, says="line 22")


def test_data_that_is_not_there(cli):
    _failed(_fit(cli, "nowhere"), code=1, says="nowhere")


def test_a_loss_that_is_no_number(cli, photos):
    weights = timm.create_model("test_resnet", num_classes=2).state_dict()
    weights["fc.weight"].fill_(3e38)
    save_file(weights, "huge.safetensors")
    done = _fit(cli, photos, "--weights", "huge.safetensors", "--policy", "full")
    _failed(done, code=1, says="a loss of ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "freeze:select=nope"], "'nope'"),
        (["--policy", "freeze:select=all"], "freezes everything"),
        (["--policy", "gradul"], "did you mean 'gradual'?"),
        (["--policy", "gradual:evry=1ep"], "did you mean 'every'?"),
        (["--lr", "fast"], "lr"),
        (["--lr", "1e9"], "lr"),
        (["--epochs", "0"], "epochs"),
        (["--epochs", "1", "--epochs", "2"], "multiple times"),
        (["--val-fraction", "0.6", "--test-fraction", "0.6"], "leave nothing to train on"),
    ],
)
def test_a_wrong_request(cli, photos, arguments, says):
    _failed(_fit(cli, photos, *arguments), code=2, says=says)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("timm:resnet1", "did you mean"),
        ("resnet18", "timm:NAME"),
        ("torchvision:nope", "nope"),
        ("nowhere.at_all:model", "nowhere"),
    ],
)
def test_no_such_model(cli, photos, model, says):
    _failed(_fit(cli, photos, model=model), code=1, says=says)


def test_a_typo_in_the_configuration(cli):
    Path("run.yaml").write_text("model: timm:test_resnet\ndata: photos\nepcohs: 3\n")
    done = cli("fit", "--config", "run.yaml")
    _failed(done, code=2, says="did you mean 'epochs'?")
    assert "run.yaml, line 3" in done.err


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "timm:test_resnet"]])
def test_nothing_to_train_on(cli, arguments):
    _failed(cli(*arguments), code=2, says="configure a run")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["predict", "nowhere", "a.png"], 1, "no such folder"),
        (["predict", "."], 2, "no inputs"),
        (["predict", ".", "@nothing.txt"], 1, "nothing.txt"),
        (["predict", ".", "a.png", "--top", "0"], 2, "fewer than one"),
        (["runs", "nowhere"], 1, "no such folder"),
    ],
)
def test_wrong_use_of_a_run(cli, arguments, code, says):
    _failed(cli(*arguments), code=code, says=says)


def test_predicting_for_what_is_no_picture(cli, finished):
    Path("a.png").write_bytes(b"\x1b]0;title\x07")
    done = cli("predict", finished, "a.png")
    _failed(done, code=1, says="a.png")
    assert "\x1b" not in done.err


def test_a_run_that_is_not_finished_cannot_predict(cli, finished):
    shutil.copytree(finished, "half")
    shutil.rmtree("half/model")
    Path("half/summary.json").unlink()
    Path("half/certificate.json").unlink()
    _failed(cli("predict", "half", "a.png"), code=1, says="no finished run there", run="half")


def test_names_from_data_cannot_steer_the_terminal(cli):
    data = _pictures(Path("data"), {"red": 8, "gr\x1b[31m\u202een": 8})
    (data / "gr\x1b[31m\u202een" / "0.png").write_bytes(b"no picture")
    done = _fit(cli, data)
    _failed(done, code=1, says=r"gr\x1b[31m\u202een")
    assert "\x1b" not in done.err
    assert "\u202e" not in done.err


def test_a_disk_that_is_full(photos):
    """A limit on the size of files stands in for the disk: every write beyond it fails."""

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [
            *COMMAND,
            "fit",
            "timm:test_resnet",
            photos,
            "--epochs",
            "1",
            "--output",
            "out",
            *RANDOM,
            *QUICK,
        ],
        capture_output=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=no_room,  # one thread here
        text=True,
    )
    message = done.stderr.splitlines()
    assert done.returncode == 1
    assert any(line.startswith("cannot ") for line in message[-3:])
    assert "Traceback" not in done.stderr
    left = {p.name for p in Path("out").iterdir()}
    assert not left & {"summary.json", "model", "certificate.json"}
    assert not [p for p in Path("out").rglob("*") if p.name.startswith(".tmp-")]


def test_an_interrupted_run_goes_on(photos):
    arguments = ["fit", "timm:test_resnet", photos, "--epochs", "12", "--patience", "null"]
    call = [*COMMAND, *map(str, arguments), "--output", "out", *RANDOM, *QUICK]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(call, stderr=subprocess.PIPE, env=env, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("epoch 1/"):
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    assert child.returncode == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert not Path("out/summary.json").exists()
    again = subprocess.run(call, capture_output=True, check=True, env=env, text=True)
    assert again.stderr.startswith("going on in out after update ")
    assert {p.name for p in Path("out").iterdir()} == WHOLE | {"probes.json"}
