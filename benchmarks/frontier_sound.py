"""Spoken digits by KWT-1 with a loop of one's own over `Region` and `Store`.

`frostline fit` has no task for sound, so this is also what the cache looks like without it: find
the region once, fill blocks of 32 samples when training first meets them, read rows for each batch.
"""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frontier_models as models
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from frostline.backends.torch.example import Example
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.frontier.store import BLOCK_ROWS, Column, Store
from frostline.groups import LayerGroups
from frostline.tasks.order import epoch_order, seed_update

RATE, LENGTH = 16_000, 16_000
BATCH = 32
Split = tuple[Tensor, Tensor]


def read_wave(path: Path) -> NDArray[np.float32]:
    """One second at 16 kHz, centred, in [-1, 1]: (16000,)."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2), path
        rate = file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    count = round(len(raw) * RATE / rate)
    old = np.arange(len(raw)) / rate
    found = np.interp(np.arange(count) / RATE, old, raw).astype(np.float32)[:LENGTH]
    before = (LENGTH - len(found)) // 2
    return np.pad(found, (before, LENGTH - len(found) - before))


def read_split(folder: Path, limit: int = 0) -> Split:
    """Waveforms (N, 16000) and labels of a folder of class folders.

    Args:
        folder: of a split.
        limit: at most so many samples, evenly taken; 0: all.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [(path, i) for i, name in enumerate(classes) for path in (folder / name).iterdir()]
    files.sort()
    if limit:
        files = files[:: -(-len(files) // limit)]
    waves = np.stack([read_wave(path) for path, _ in files])
    return torch.from_numpy(waves), torch.tensor([label for _, label in files])


class Rows:
    """Stored rows of a split, filled block by block when they are first asked for."""

    def __init__(self, region: Any, inputs: Tensor, folder: Path) -> None:
        self._region, self._inputs, self._folder = region, inputs, folder
        self._store: Store | None = None

    def _filled(self, firsts: list[int]) -> list[dict[str, NDArray[Any]]]:
        blocks = [Example((self._inputs[first : first + BLOCK_ROWS],)) for first in firsts]
        filled = self._region.fill_many(blocks)
        return [{name: value.numpy() for name, value in rows.items()} for rows in filled]

    def _opened(self, block: dict[str, NDArray[Any]]) -> Store:
        columns = [Column(name, str(value.dtype)) for name, value in block.items()]
        return Store(self._folder, columns, rows=len(self._inputs), seed=b"benchmark")

    def of(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows of these samples."""
        wanted = indices.numpy()
        there = np.zeros(len(wanted), bool) if self._store is None else self._store.present(wanted)
        firsts = (np.unique(wanted[~there] // BLOCK_ROWS) * BLOCK_ROWS).tolist()
        for first, values in zip(firsts, self._filled(firsts) if firsts else (), strict=True):
            self._store = self._store or self._opened(values)
            assert self._store.write(first, values)
        assert self._store is not None
        read, good = self._store.read(wanted)
        assert good.all(), "damaged rows"
        return {name: torch.from_numpy(value) for name, value in read.items()}

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the store."""
        return self._store.bytes_on_disk if self._store else 0

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()


class SoundRun:
    """One run of KWT-1 on spoken digits, validated after every epoch, tested at the end.

    Args:
        data: the data set's folder.
        trains: how many links of the chain are frozen: 1 (front end) to 13 (all blocks).
        epochs: of the run.
        lr: of AdamW.
        seed: of head and order.
        store: folder of the stored rows; None trains without.
        limit: samples of each split, at most; 0: all.
    """

    def __init__(
        self,
        data: Path,
        *,
        trains: int,
        epochs: int,
        lr: float,
        seed: int = 0,
        store: Path | None = None,
        limit: int = 0,
    ) -> None:
        self.train, self.val, self.test = (
            read_split(data / name, limit) for name in ("train", "val", "test")
        )
        self.epochs, self.seed, self.store = epochs, seed, store
        parts = models.keyword_parts()
        owners = sum(bool(part.modules) for part in parts)
        self.cut = models.Cut("", parts, owners - trains)
        self.model = models.keyword_transformer(10, seed=seed)
        self.cut.freeze(self.model)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=lr
        )

    def groups(self, batch: int) -> tuple[LayerGroups, list[str]]:
        """Layer groups with measured costs, and which of them are frozen."""
        example = Example((self.train[0][:batch],))
        groups = measure_costs(self.model, layer_groups(self.model, example), example, repeats=5)
        inside = tuple(f"{name}." for name in self.cut.frozen)
        frozen = [
            g.name
            for g in groups
            if all(p.name.startswith(inside) or p.name in self.cut.frozen for p in g.parameters)
        ]
        return groups, frozen

    def result(self, note: Callable[[str], None]) -> dict[str, Any]:
        """Train, evaluate and test; `note` is told of start, epochs and end."""
        note("start")
        step, losses, accuracy = 0, list[float](), 0.0
        trained = validated = self._rows("train")
        for epoch in range(self.epochs):
            self.cut.freeze(self.model)
            order = torch.tensor(epoch_order(self.seed, epoch, len(self.train[1])))
            total = 0.0
            for picked in order.split(BATCH):
                seed_update(self.seed, "update", step)
                total += self._update(picked, trained) * len(picked)
                step += 1
            losses.append(total / len(order))
            if epoch == 0:
                validated = self._rows("val", trained)
            accuracy = self._accuracy(self.val, validated)
            note("epoch")
        disk = sum(rows[1].bytes_on_disk for rows in (trained, validated) if rows)
        for rows in (trained, validated):
            if rows:
                rows[1].close()
        tested = self._accuracy(self.test, None)
        note("end")
        return {
            "test_accuracy": tested,
            "val_accuracy": accuracy,
            "losses": losses,
            "bytes_on_disk": disk,
        }

    def _rows(self, split: str, trained: tuple[Any, Rows] | None = None) -> tuple[Any, Rows] | None:
        """Region and rows of a split; validation replays the model as it evaluates."""
        if self.store is None:
            return None
        from frostline.frontier.region import find_region  # noqa: PLC0415  not without a store

        inputs = getattr(self, split)[0]
        self.cut.freeze(self.model)
        if split != "train":
            self.model.eval()
        few = Example((inputs[:4],))
        region = find_region(self.model, few) if trained is None else self._again(trained[0], few)
        return region, Rows(region, inputs, self.store / split)

    def _again(self, region: Any, few: Example) -> Any:
        """The region of training in evaluation, as the cache of the library has it."""
        from frostline.errors import FrontierError  # noqa: PLC0415  as above
        from frostline.frontier.region import find_region  # noqa: PLC0415

        try:
            return region.again(few)
        except FrontierError:
            return find_region(self.model, few)

    def _update(self, picked: Tensor, rows: tuple[Any, Rows] | None) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            self._scores(self.train[0], picked, rows), self.train[1][picked]
        )
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _scores(self, inputs: Tensor, picked: Tensor, rows: tuple[Any, Rows] | None) -> Tensor:
        if rows is None:
            return self.model(inputs[picked])
        region, stored = rows
        # What the batch is made of is not looked at: only its size.
        return region.run(Example((inputs[: len(picked)],)), stored.of(picked))

    def _accuracy(self, split: Split, rows: tuple[Any, Rows] | None) -> float:
        self.model.eval()
        order = torch.arange(len(split[1]))
        with torch.no_grad():
            scores = [self._scores(split[0], picked, rows) for picked in order.split(BATCH)]
        return float((torch.cat(scores).argmax(1) == split[1]).double().mean())
