"""What does the cache cost in memory and on disk, and what do shorter numbers and few views cost?

Three kinds of measurement:

- peak resident memory of whole runs with and without the cache, each in a process of its own;
- bytes on disk per sample by encoding, through `Store`, and the accuracy of heads trained on what
  is read back; the test is always the whole model on the test samples;
- accuracy with K stored augmented views per sample, against fresh views every epoch (what an
  uncached run sees) and none.

    python benchmarks/frontier_memory.py [--quick] [--rounds 5] [--threads 2]
    python benchmarks/frontier_memory.py --report        # the table from the log
    python benchmarks/frontier_memory.py --device cuda   # only the memory, of a GPU as well

`--rounds` counts seeds of head and order. Needs the shared folder beside the checkout.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import frontier_models as models
import numpy as np
import torch
from bench import made_by
from frontier_bench import (
    arguments,
    describe,
    gather,
    machine_of,
    ratio_text,
    rows_of,
    size_text,
)
from frontier_models import SHARED, Cut, State
from numpy.typing import NDArray
from torch import Tensor, nn

from frostline.frontier.store import BLOCK_ROWS, Column, Encoding, Store
from frostline.frontier.views import Views
from frostline.tasks.config import load_config
from frostline.tasks.image import from_spec, pixel_spec
from frostline.tasks.order import derive_seed, epoch_order, seed_update

ENCODINGS: tuple[Encoding, ...] = ("exact", "bfloat16", "float16", "int8")
COUNTS = (1, 2, 4, 8)
FRESH, NONE = "fresh every epoch", "none"
BATCH = 32
#: By seeds, the standard errors that a mean difference must exceed to be called one: Student's t,
#: 95 %, two-sided.
CLEAR = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
Rows = Callable[[NDArray[np.int64], int], State]


# -- training the rest ------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model cut at some depth, and how the rest is trained.

    Attributes:
        model: with pretrained weights and any head; never changed.
        cut: the depth.
        lr: of everything that trains but the head.
        head_lr: of the head.
        epochs: of a run.
    """

    model: nn.Module
    cut: Cut
    lr: float
    head_lr: float
    epochs: int

    def fresh(self, seed: int) -> nn.Module:
        """A copy with a new head, frozen at the cut."""
        model = copy.deepcopy(self.model)
        torch.manual_seed(derive_seed(seed, "head", 0))
        model.get_submodule(self.head).apply(_reset)
        self.cut.freeze(model)
        return model

    @property
    def head(self) -> str:
        """Name of the last module of the chain."""
        return self.cut.parts[-1].modules[-1]


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def train_rest(
    setting: Setting, rows: Rows, targets: Tensor, test: tuple[State, Tensor], seed: int
) -> float:
    """Train the rest of the model on stored rows: accuracy on the test samples.

    Args:
        setting: what is trained.
        rows: the rows of samples in an epoch.
        targets: their labels.
        test: exact rows of the test samples, and labels: what the whole model sees of them.
        seed: of head, order and dropout.
    """
    model = setting.fresh(seed)
    rest = setting.cut.rest(model)
    head = {id(p) for p in model.get_submodule(setting.head).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if id(p) in head], "lr": setting.head_lr},
            {"params": [p for p in trained if id(p) not in head], "lr": setting.lr},
        ],
        weight_decay=0.01,
    )
    per_epoch = -(-len(targets) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.epochs * per_epoch)
    for epoch in range(setting.epochs):
        order = np.array(epoch_order(seed, epoch, len(targets)))
        for step, picked in enumerate(np.array_split(order, per_epoch)):
            seed_update(seed, "update", epoch * per_epoch + step)
            optimizer.zero_grad()
            scores = rest(rows(picked, epoch))
            nn.functional.cross_entropy(scores, targets[picked]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return _accuracy(model, rest, test)


def _accuracy(
    model: nn.Module, rest: Callable[[State], Tensor], test: tuple[State, Tensor]
) -> float:
    stored, targets = test
    model.eval()
    with torch.no_grad():
        parts = torch.arange(len(targets)).split(BATCH)
        scores = torch.cat([rest(tuple(t[part] for t in stored)) for part in parts])
    return float((scores.argmax(1) == targets).double().mean())


def front_rows(setting: Setting, batches: Iterable[State]) -> State:
    """Exact rows of all samples, block by block."""
    model = copy.deepcopy(setting.model)
    setting.cut.freeze(model)
    front = setting.cut.front(model)
    parts = [front(batch) for batch in batches]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


# -- data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """A folder of class folders, prepared on demand."""

    paths: Sequence[Path]
    targets: Tensor
    prepare: Callable[[Path, int, int | None], Tensor]

    def batches(self, view: int | None = None) -> Iterable[State]:
        """All of them in blocks, in one view; None: not augmented."""
        for start in range(0, len(self.paths), BLOCK_ROWS):
            block = enumerate(self.paths[start : start + BLOCK_ROWS], start)
            yield (torch.stack([self.prepare(path, i, view) for i, path in block]),)


def pictures(data: str, split: str, pixels: int, scale: Scale, *, limit: int) -> Pictures:
    """A split of a data set of pictures, with crops and flips for views.

    Args:
        data: folder below `data` of the shared folder.
        split: of it.
        pixels: side of the square.
        scale: mean and standard deviation.
        limit: at most so many, evenly taken; 0: all.
    """
    folder = SHARED / "data" / data / split
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [(p, i) for i, name in enumerate(classes) for p in sorted((folder / name).iterdir())]
    files = files[:: -(-len(files) // limit)] if limit else files
    mean, std = scale
    given = {"model": "m:m", "data": data, "image_size": pixels, "augment": "basic"}
    config = load_config(None, given | {"image_mean": mean, "image_std": std})
    prepare = from_spec(pixel_spec(config)).configured(config)
    return Pictures([p for p, _ in files], torch.tensor([label for _, label in files]), prepare)


Scale = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0: Scale = ((127 / 255,) * 3, (128 / 255,) * 3)


def questions(split: str, tokens: int, *, limit: int) -> tuple[State, Tensor]:
    """Ids and masks (N, tokens) of trec6, and labels."""
    import pandas  # noqa: PLC0415  only here
    from transformers import AutoTokenizer  # noqa: PLC0415  seconds

    table = pandas.read_csv(SHARED / "data/trec6" / f"{split}.csv")
    table = table.iloc[:: -(-len(table) // limit)] if limit else table
    names = sorted(set(table["label"]))
    tokenizer = AutoTokenizer.from_pretrained(models.minilm_path(), local_files_only=True)
    found = tokenizer(
        list(table["text"]),
        truncation=True,
        max_length=tokens,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([names.index(label) for label in table["label"]])
    return (found["input_ids"], found["attention_mask"]), labels


def blocks_of(state: State) -> Iterable[State]:
    """A state in blocks of samples."""
    yield from zip(*(t.split(BLOCK_ROWS) for t in state), strict=True)


def lite0(classes: int) -> nn.Module:
    """EfficientNet-lite0, pretrained on ImageNet."""
    import timm  # noqa: PLC0415  seconds
    from safetensors.torch import load_file  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as place:
        weights = load_file(models.convert_lite0(Path(place) / "lite0.safetensors"))
    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    body = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    model.load_state_dict(body, strict=False)
    return model


def resnet20(classes: int) -> nn.Module:
    """ResNet-20, pretrained on CIFAR-10."""
    from safetensors.torch import load_file  # noqa: PLC0415

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    # Tests are no package.
    from models_for_tests import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        resnet20 as make,
    )

    weights = load_file(SHARED / "models/resnet_cifar10/resnet20.safetensors")
    body = {name: w for name, w in weights.items() if not name.startswith("linear.")}
    model = make(classes)
    model.load_state_dict(body, strict=False)
    return model


# -- encodings --------------------------------------------------------------------------------


def encodings_on_pictures(seeds: int, *, quick: bool) -> dict[str, Any]:
    """Encodings on flowers5 with EfficientNet-lite0."""
    limit, pixels = (40, 64) if quick else (0, 160)
    train, test = (
        pictures("flowers5", split, pixels, LITE0, limit=limit) for split in ("train", "test")
    )
    cuts = models.cuts_of(models.lite0_parts(), {"all but head": 1, "all but last block": 3})
    model, depths = lite0(5), []
    for cut in cuts:
        setting = Setting(model, cut, 3e-4, 1e-2, 2 if quick else 10)
        stored = front_rows(setting, train.batches())
        tested = front_rows(setting, test.batches())
        depths += encodings(setting, stored, train.targets, (tested, test.targets), seeds)
    title = f"flowers5, EfficientNet-lite0 at {pixels} px"
    return {"kind": "encodings", "title": title, "entries": depths}


def encodings_on_texts(seeds: int, *, quick: bool) -> dict[str, Any]:
    """Encodings on trec6 with MiniLM."""
    limit, tokens = (96, 16) if quick else (2000, 32)
    inputs, targets = questions("train", tokens, limit=limit)
    test_inputs, test_targets = questions("test", tokens, limit=limit)
    parts = models.bert_parts(6, padded=True)
    model, depths = models.minilm(6), []
    for cut in models.cuts_of(parts, {"all but head": 1, "all but last block": 2}):
        setting = Setting(model, cut, 1e-4, 1e-2 if cut.trains == 1 else 1e-3, 2 if quick else 5)
        stored = front_rows(setting, blocks_of(inputs))
        tested = front_rows(setting, blocks_of(test_inputs))
        depths += encodings(setting, stored, targets, (tested, test_targets), seeds)
    title = f"trec6, {len(targets):,} questions of {tokens} tokens, MiniLM"
    return {"kind": "encodings", "title": title, "entries": depths}


def encodings(
    setting: Setting, stored: State, targets: Tensor, test: tuple[State, Tensor], seeds: int
) -> list[dict[str, Any]]:
    """One entry per encoding: bytes on disk, error of what is read back, accuracies."""
    found = []
    for encoding in ENCODINGS:
        with tempfile.TemporaryDirectory() as place:
            store = _stored(Path(place) / "store", encoding, stored)

            def read(picked: NDArray[np.int64], _: int, store: Store = store) -> State:
                values, good = store.read(picked)
                assert good.all(), "damaged rows"
                return tuple(torch.from_numpy(values[str(i)]) for i in range(len(stored)))

            entry = {
                "depth": setting.cut.name,
                "encoding": encoding,
                "bytes_on_disk": store.bytes_on_disk / len(targets),
                "bytes_in_memory": sum(t.nbytes for t in stored) / len(targets),
                "error": _error(stored[0], read(np.arange(len(targets)), 0)[0]),
                "accuracies": [
                    train_rest(setting, read, targets, test, seed) for seed in range(seeds)
                ],
            }
            store.close()
        found.append(entry)
    return found


def _stored(folder: Path, encoding: Encoding, values: State) -> Store:
    arrays = {str(i): t.numpy() for i, t in enumerate(values)}
    columns = [Column(name, str(a.dtype), encoding) for name, a in arrays.items()]
    count = len(values[0])
    store = Store(folder, columns, rows=count, seed=b"benchmark")
    for first in range(0, count, BLOCK_ROWS):
        block = {name: a[first : first + BLOCK_ROWS] for name, a in arrays.items()}
        assert store.write(first, block)
    return store


def _error(exact: Tensor, read: Tensor) -> float:
    """Root mean square of the difference over that of the values."""
    difference = (exact.double() - read.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt())


# -- views ------------------------------------------------------------------------------------


def views_on_flowers(seeds: int, *, quick: bool) -> dict[str, Any]:
    """Views on flowers5: the head of EfficientNet-lite0."""
    epochs, limit, pixels = (3, 40, 64) if quick else (12, 0, 160)
    (cut,) = models.cuts_of(models.lite0_parts(), {"all but head": 1})
    setting = Setting(lite0(5), cut, 3e-4, 1e-2, epochs)
    title = f"flowers5, EfficientNet-lite0 at {pixels} px, all but the head frozen"
    return _views("flowers5", title, setting, pixels, LITE0, seeds, limit)


def views_on_caltech(seeds: int, *, quick: bool) -> dict[str, Any]:
    """Views on caltech20: the last stage of ResNet-20."""
    epochs, limit = (3, 40) if quick else (20, 0)
    (cut,) = models.cuts_of(models.resnet20_parts(), {"all but last stage": 4})
    setting = Setting(resnet20(20), cut, 1e-3, 1e-2, epochs)
    title = "caltech20_32, ResNet-20, all but the last stage frozen"
    return _views("caltech20_32", title, setting, 32, IMAGENET, seeds, limit)


def _views(
    data: str, title: str, setting: Setting, pixels: int, scale: Scale, seeds: int, limit: int
) -> dict[str, Any]:
    train, test = (pictures(data, s, pixels, scale, limit=limit) for s in ("train", "test"))
    epochs = setting.epochs
    plain = front_rows(setting, train.batches(None))
    # What epoch e of an uncached run sees; the first K of them are the stored ones.
    seen = [front_rows(setting, train.batches(view)) for view in range(epochs)]
    tested = front_rows(setting, test.batches(None)), test.targets
    arms: dict[str, Callable[[int], Rows]] = {
        NONE: lambda _: lambda picked, _: tuple(t[picked] for t in plain)
    }
    for count in (k for k in COUNTS if k < epochs):
        arms[str(count)] = lambda seed, count=count: _from_views(seen, Views(count, seed=seed))
    arms[FRESH] = lambda _: lambda picked, epoch: tuple(t[picked] for t in seen[epoch])
    entries = [
        {
            "views": name,
            "accuracies": [
                train_rest(setting, arm(seed), train.targets, tested, seed) for seed in range(seeds)
            ],
        }
        for name, arm in arms.items()
    ]
    return {"kind": "views", "title": title, "epochs": epochs, "entries": entries}


def _from_views(seen: Sequence[State], views: Views) -> Rows:
    """Rows of the view that each sample has in an epoch."""

    def rows(picked: NDArray[np.int64], epoch: int) -> State:
        chosen = views.of(epoch, picked)
        width = range(len(seen[0]))
        pairs = list(zip(picked.tolist(), chosen.tolist(), strict=True))
        return tuple(torch.stack([seen[view][w][i] for i, view in pairs]) for w in width)

    return rows


# -- memory -----------------------------------------------------------------------------------

MEMORY_JOBS = (
    "flowers5-lite0-probe",
    "flowers5-lite0-half",
    "trec6-minilm-probe",
    "fsdd-kwt1-half",
)
#: The loop for sounds trains on the processor.
CUDA_MEMORY_JOBS = tuple(job for job in MEMORY_JOBS if not job.startswith("fsdd"))


def memory(name: str, threads: int, *, quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Peak resident memory of a whole run without and with the cache, in processes of their own."""
    entries = []
    for cache in ("off", "on"):
        found = _in_process(name, cache, threads, quick=quick, device=device)
        keys = ["peak_bytes", "before_bytes", "test_accuracy"]
        keys += ["cuda_peak_bytes"] if device == "cuda" else []
        entries.append({"job": name, "cache": cache, **{k: found[k] for k in keys}})
    return {"kind": "memory", "title": name, "entries": entries}


def _in_process(name: str, cache: str, threads: int, *, quick: bool, device: str) -> dict[str, Any]:
    script = Path(__file__).with_name("frontier_runs.py")
    size = "quick" if quick else "full"
    command = [sys.executable, str(script), "--one", name, cache, str(threads), size, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, cache {cache}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the tables -------------------------------------------------------------------------------


def compared(accuracies: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean difference over equal seeds, and its standard error (0 for a single seed)."""
    each = [a - b for a, b in zip(accuracies, reference, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return statistics.mean(each), error


def verdict(difference: float, error: float, seeds: int) -> str:
    """What a difference says.

    Example:
        >>> verdict(-0.05, 0.01, 3), verdict(-0.04, 0.01, 3), verdict(0.5, 0.0, 1)
        ('lower', 'no difference seen', 'one seed')
    """
    if seeds < 2:
        return "one seed"
    if abs(difference) <= CLEAR.get(seeds, 2.2) * error or not difference:
        return "no difference seen"
    return "higher" if difference > 0 else "lower"


def encodings_table(result: Mapping[str, Any]) -> list[str]:
    """Bytes, errors and accuracies by depth and encoding."""
    rows = []
    exact = {e["depth"]: e for e in result["entries"] if e["encoding"] == "exact"}
    for entry in result["entries"]:
        base = exact[entry["depth"]]
        difference, error = compared(entry["accuracies"], base["accuracies"])
        rows.append(
            [
                entry["depth"],
                entry["encoding"],
                size_text(entry["bytes_on_disk"]),
                ratio_text(base["bytes_on_disk"] / entry["bytes_on_disk"]),
                f"{entry['error']:.1e}" if entry["error"] else "0",
                f"{statistics.mean(entry['accuracies']):.4f}",
                "" if entry is base else f"{difference:+.4f} ± {error:.4f}",
                "" if entry is base else verdict(difference, error, len(entry["accuracies"])),
            ]
        )
    head = ("frozen", "encoding", "on disk per sample", "times smaller", "relative error")
    return rows_of((*head, "test accuracy", "against exact", ""), rows)


def views_table(result: Mapping[str, Any]) -> list[str]:
    """Accuracies by number of views."""
    rows = []
    fresh = next(e for e in result["entries"] if e["views"] == FRESH)
    for entry in result["entries"]:
        difference, error = compared(entry["accuracies"], fresh["accuracies"])
        rows.append(
            [
                entry["views"],
                f"{statistics.mean(entry['accuracies']):.4f}",
                "" if entry is fresh else f"{difference:+.4f} ± {error:.4f}",
                "" if entry is fresh else verdict(difference, error, len(entry["accuracies"])),
            ]
        )
    return rows_of(("stored views K", "test accuracy", f"against {FRESH}", ""), rows)


def memory_table(result: Mapping[str, Any]) -> list[str]:
    """Peaks with and without the cache."""
    rows = []
    by = {(e["job"], e["cache"]): e for e in result["entries"]}
    for job in dict.fromkeys(e["job"] for e in result["entries"]):
        off, on = by[job, "off"], by[job, "on"]
        rows.append(
            [
                f"`{job}`",
                size_text(off["before_bytes"]),
                size_text(off["peak_bytes"]),
                size_text(on["peak_bytes"]),
                f"{on['peak_bytes'] / off['peak_bytes']:.2f}",
            ]
        )
        if "cuda_peak_bytes" in on:
            peaks = [entry["cuda_peak_bytes"] for entry in (off, on)]
            texts = [size_text(peak) for peak in peaks]
            rows[-1] += [*texts, f"{peaks[1] / peaks[0]:.2f}"]
    head = ("run", "before, with all imported", "peak uncached", "peak cached", "cached / uncached")
    if any(len(row) > len(head) for row in rows):
        head += ("on the GPU uncached", "on the GPU cached", "cached / uncached")
    return rows_of(head, rows)


ABOUT = {
    "encodings": (
        "Rows of all training samples are written to a store in one encoding and read back for "
        "every batch; the rest of the model is trained on them from equal seeds, and tested as the "
        "whole model on unencoded test samples. 'On disk' counts all files of the store. 'Relative "
        "error' is the root mean square of the difference over that of the values. A difference "
        "is 'lower' or 'higher' where its 95 % interval over seeds (Student's t) leaves out zero; "
        "± is one standard error."
    ),
    "views": (
        "Crops (50 to 100 % of the area) and flips. K views of every sample are drawn once and "
        "used as `Views(K)` orders them: one after the other in the first K epochs, then in random "
        "order. 'Fresh every epoch' is what an uncached run sees, 'none' is no augmentation. The "
        "test has no augmentation."
    ),
    "memory": (
        "Largest resident set of a process that does one whole run and nothing else. It counts "
        "pages of the store that are mapped into memory, which the system takes back when it "
        "needs them."
    ),
}
TABLES = {"encodings": encodings_table, "views": views_table}
HEADINGS = {
    "memory": "Memory of whole runs",
    "encodings": "Disk and accuracy by encoding",
    "views": "Accuracy by number of stored views",
}


def table(log: Mapping[str, Any]) -> str:
    """Markdown, from the log alone."""
    lines = ["# Memory, disk and what they cost in accuracy", "", describe(log)]
    for kind, heading in HEADINGS.items():
        results = [r for r in log["results"] if r["kind"] == kind]
        if not results:
            continue
        lines += ["", f"## {heading}", "", ABOUT[kind]]
        if kind == "memory":  # one table
            entries = [entry for result in results for entry in result["entries"]]
            lines += ["", *memory_table({"entries": entries})]
            continue
        for result in results:
            entries = result["entries"]
            about = f"{len(entries[0]['accuracies'])} seeds."
            about += f" {result['epochs']} epochs." if kind == "views" else ""
            lines += ["", f"### {result['title']}", "", about, ""]
            lines += TABLES[kind](result)
    lines += ["", made_by("frontier_memory", machine_of(log))]
    return "\n".join(lines) + "\n"


def main() -> None:
    others = ("encodings-flowers5", "encodings-trec6", "views-flowers5", "views-caltech20")
    names = (*(f"memory-{job}" for job in MEMORY_JOBS), *others)
    chosen = arguments(__doc__, rounds=5, quick=2, only=names, devices=("cpu", "cuda"))
    if chosen.device == "cuda":
        on_gpu = {"quick": chosen.quick, "device": "cuda"}
        runs = {
            f"memory-{j}": partial(memory, j, chosen.threads, **on_gpu) for j in CUDA_MEMORY_JOBS
        }
        gather("frontier_memory", chosen, runs, table)
        return
    size = {"quick": chosen.quick}
    seeds = chosen.rounds
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        f"memory-{job}": partial(memory, job, chosen.threads, **size) for job in MEMORY_JOBS
    }
    makers |= {
        "encodings-flowers5": lambda: encodings_on_pictures(seeds, **size),
        "encodings-trec6": lambda: encodings_on_texts(seeds, **size),
        "views-flowers5": lambda: views_on_flowers(seeds, **size),
        "views-caltech20": lambda: views_on_caltech(seeds, **size),
    }
    start = time.monotonic()
    gather("frontier_memory", chosen, makers, table)
    print(f"took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
