"""A tuned model as a folder, and back with one call.

::

    model.safetensors     weights (Hugging Face models: as `save_pretrained` writes them, with
    config.json, ...      configuration and tokenizer or image processor beside)
    head.safetensors      the linear head, where it sits on a mean-pooled text encoder
    frostline.json        labels, and what the architecture and its preparation are built from
    README.md             model card

Nothing in it is code. Loading downloads nothing; only models of the user's own are rebuilt by
importing the function they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from frostline import _io
from frostline.errors import DataError, ModelError
from frostline.tasks.built import Kind, Preparation
from frostline.tasks.config import RunConfig
from frostline.tasks.hf_source import HEAD_FILE, quiet
from frostline.tasks.imports import need
from frostline.tasks.models import model_logits, rebuild_model
from frostline.tasks.pooled import MeanPooledClassifier
from frostline.tasks.weights import read_weights

__all__ = ["Loaded", "Prediction", "describe", "load_saved", "save_model"]

FORMAT = 1
WEIGHTS_FILE, ABOUT_FILE, CARD_FILE = "model.safetensors", "frostline.json", "README.md"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        label: the most probable class.
        probability: its probability, [0, 1].
        probabilities: of every class, in the order of the model's outputs; they sum to 1.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Loaded:
    """A tuned model, ready to use.

    Attributes:
        model: plain torch module in eval mode, on the CPU.
        kind: "image" or "text".
        labels: class names, in the order of the outputs.
        preparation: turns one raw input into what `collate` batches.
    """

    model: nn.Module
    kind: Kind
    labels: tuple[str, ...]
    preparation: Preparation

    def preprocess(self, inputs: Sequence[Any]) -> tuple[Any, ...] | Mapping[str, Any]:
        """Raw inputs as one batch: `model(*batch)` for a tuple, `model(**batch)` for a mapping.

        Args:
            inputs: paths, PIL pictures or uint8 arrays; or texts.

        Raises:
            DataError: an input that cannot be read, or is of the wrong kind.
        """
        preparation: Any = self.preparation
        return preparation.collate([preparation(self._checked(raw)) for raw in inputs])

    def predict(self, inputs: Sequence[Any], *, batch_size: int = 32) -> list[Prediction]:
        """Labels and probabilities, one per input, computed where the model is.

        Args:
            inputs: as for `preprocess`.
            batch_size: inputs per forward pass, >= 1.

        Raises:
            DataError: an input that cannot be read, or is of the wrong kind.
        """
        if isinstance(inputs, str | Path):
            raise DataError(
                f"predict for {str(inputs)!r}",
                found="a single input where a list belongs",
                fix="put it in a list: predict([...])",
            )
        found: list[Prediction] = []
        for start in range(0, len(inputs), batch_size):
            scores = self._scores(inputs[start : start + batch_size])
            found += [self._prediction(row) for row in scores.softmax(dim=1).tolist()]
        return found

    def _scores(self, inputs: Sequence[Any]) -> Tensor:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = self.preprocess(inputs)
        with torch.inference_mode():
            if isinstance(batch, tuple):
                moved: Any = tuple(v.to(device) for v in batch)
            else:
                moved = {k: v.to(device) for k, v in batch.items()}
            return model_logits(self.model, moved, classes=len(self.labels)).double().cpu()

    def _prediction(self, row: Sequence[float]) -> Prediction:
        best = max(range(len(row)), key=row.__getitem__)
        return Prediction(self.labels[best], row[best], dict(zip(self.labels, row, strict=True)))

    def _checked(self, raw: Any) -> Any:
        if self.kind == "text" and (not isinstance(raw, str) or not raw.strip()):
            raise DataError(
                f"classify {raw!r}"[:200], found="no text", fix="a string that is not empty"
            )
        return raw


def save_model(
    folder: Path,
    model: nn.Module,
    *,
    preparation: Preparation,
    spec: Mapping[str, Any],
    labels: Sequence[str],
    card: str,
) -> None:
    """Write what `load_saved` reads.

    Args:
        folder: created if absent; files of an earlier model in it are replaced one by one.
        model: the trained model.
        preparation: of its inputs.
        spec: what the architecture is built from.
        labels: in the order of the outputs.
        card: Markdown for people.

    Raises:
        StorageError: a file cannot be written.
    """
    about = {"format": FORMAT, "labels": list(labels), "spec": dict(spec)}
    _io.make_folder(folder)
    with _io.storage_errors(f"save the model in {folder}"):
        if spec["source"] == "hf":
            _save_pretrained(folder, model)
        else:
            safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))
        if preparation.extras is not None:
            preparation.extras(str(folder))
    _io.atomic_write_json(folder / ABOUT_FILE, about)
    _io.atomic_write_text(folder / CARD_FILE, card)


def load_saved(folder: str | Path) -> Loaded:
    """The model of a folder that `save_model` wrote, with its preparation. Nothing is downloaded.

    Raises:
        ModelError: not such a folder, or its parts do not fit together.
        DamagedFile: its description is damaged.
    """
    folder = Path(folder)
    about = _read_about(folder)
    labels, spec = tuple(about["labels"]), about["spec"]
    built = rebuild_model(spec, folder, labels)
    if spec["source"] != "hf":
        _load_weights(built.model, folder / WEIGHTS_FILE)
    kind: Kind = "text" if spec.get("kind") == "text" else "image"
    return Loaded(built.model.eval(), kind, labels, built.preparation)


def describe(config: RunConfig, notes: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """A model card in Markdown: what it is, what it learnt from, how well, how to load it."""
    samples = notes.get("samples", {})
    classes = notes.get("classes", {})
    policy = _plain(config.policy)
    lines = [
        f"# {_plain(config.model)} tuned on {_plain(Path(config.data).name)}",
        "",
        f"{len(classes)} classes, fine-tuned by Frostline with the policy {policy}.",
        "",
        "## Data",
        *(f"- {name}: {count} samples" for name, count in samples.items()),
        "",
        "## Classes",
        *(f"- {_plain(name)}: {count} training samples" for name, count in classes.items()),
        "",
        "## Measured",
        *(f"- {_plain(name)}: {value:.4g}" for name, value in metrics.items()),
        *(() if metrics else ("Nothing was measured.",)),
        "",
        "## Use",
        "```python",
        "import frostline",
        "",
        "tuned = frostline.load('this folder')",
        "print(tuned.predict(['an input'])[0].label)",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text of any origin on one Markdown line, without markup or control characters."""
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in safe)[:200]


def _save_pretrained(folder: Path, model: Any) -> None:
    transformers = need("transformers", extra="text")
    whole = model.backbone if isinstance(model, MeanPooledClassifier) else model
    with quiet(transformers):
        whole.save_pretrained(str(folder))
    if isinstance(model, MeanPooledClassifier):
        safetensors.torch.save_model(model.classifier, str(folder / HEAD_FILE))


def _read_about(folder: Path) -> dict[str, Any]:
    asked = f"load the model in {folder}"
    path = folder / ABOUT_FILE
    if not path.is_file():
        found = f"no {ABOUT_FILE}" if folder.is_dir() else "no such folder"
        raise ModelError(asked, found=found, fix="the 'model' folder of a finished run")
    about = _io.load_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = f"format {about.get('format') if isinstance(about, dict) else None!r}"
        raise ModelError(asked, found=found, fix=f"a folder of format {FORMAT}")
    labels, spec = about.get("labels"), about.get("spec")
    listed = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if not listed or not isinstance(spec, dict):
        raise ModelError(asked, found=f"a {ABOUT_FILE} without labels or spec", fix="save it again")
    return about


def _load_weights(model: nn.Module, path: Path) -> None:
    read_weights(path)  # our checks of the file; the library then ties shared tensors again
    try:
        safetensors.torch.load_model(model, str(path), strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"load {path}",
            found=" ".join(str(error).split())[:300],
            fix="the code of the model must be what it was when it was saved",
        ) from error
