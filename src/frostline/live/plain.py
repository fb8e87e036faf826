"""A small page of runs without charts: epochs, changes of plan, the figures so far."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frostline.records import RunRecord, read_run

__all__ = ["render"]

_EPOCH = ("epoch", "update", "train loss", "val loss", "val accuracy", "saved (predicted)")
_METRICS = ("train_loss", "val_loss", "val_accuracy")

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Frostline</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; } th { border-bottom: 1px solid #8888; }
</style></head><body>
"""


def render(paths: Sequence[Path]) -> str:
    """The page of these runs.

    Args:
        paths: run folders.

    Raises:
        DataError: no record in one of them.
        DamagedFile: a record was changed.
    """
    return _HEAD + "".join(_run(read_run(path)) for path in paths) + "</body></html>\n"


def _run(record: RunRecord) -> str:
    config = record.header["config"]
    title = f"{record.path.name}: {config['model']}, {config['policy']}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if record.summary:
        tested = record.summary.get("test_accuracy")
        said = "" if tested is None else f", test accuracy {100 * float(tested):.1f} %"
        parts.append(f"<p>finished{said}</p>")
    parts.append(_table(_EPOCH, (_epoch(line) for line in record.epochs)))
    frozen = (
        (decision.step, len(decision.plan.frozen), decision.plan.reason)
        for decision in record.decisions
    )
    parts.append(_table(("update", "groups frozen", "why"), frozen))
    return "\n".join(parts)


def _epoch(line: Mapping[str, Any]) -> tuple[object, ...]:
    saved = line["costs"].get("saved_predicted_s")
    train, val, accuracy = (line["metrics"].get(name) for name in _METRICS)
    return (
        line["epoch"],
        line["step"],
        "" if train is None else f"{float(train):.4f}",
        "" if val is None else f"{float(val):.4f}",
        "" if accuracy is None else f"{100 * float(accuracy):.1f} %",
        "" if saved is None else f"{saved:.1f} s",
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>\n"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>\n"
