"""Everything a run can be told, in one frozen object that says what each setting means.

`load_config` merges a YAML file and overrides (the overrides win), refuses what it does not
know, and names the line. `dump_config` writes the resolved settings beside the run; loading that
file gives the same configuration again.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from frostline.clock import Duration
from frostline.errors import ConfigError, DurationError
from frostline.integrations.trackers import TrackerName
from frostline.tasks import strict_yaml
from frostline.tasks.allowance import Budget

__all__ = ["RunConfig", "dump_config", "load_config", "resolve_config"]

Kind = Literal["image", "text"]


def _no_bool(value: Any) -> Any:
    # Python counts True as 1: `lr: true` would train at a rate of 1.
    if isinstance(value, bool):
        raise ValueError("true or false where a number belongs")  # noqa: TRY004  pydantic's way
    return value


def _budget(text: str) -> str:
    try:
        return str(Budget.parse(text))
    except ConfigError as error:
        raise ValueError(f"{error.found}; {error.fix}") from None


def _size(text: str) -> str:
    _size_of(text)
    return text.strip()


def _size_of(text: str) -> int:
    """Bytes of "2GiB" or "800 MB"."""
    try:
        size = int(pydantic.TypeAdapter(pydantic.ByteSize).validate_python(text))
    except pydantic.ValidationError:
        size = 0
    if size <= 0:
        raise ValueError("no size; a number and a unit, such as '2GiB' or '800MB'")
    return size


def _duration(text: str) -> str:
    try:
        return str(Duration.parse(text))
    except DurationError as error:
        raise ValueError(f"{error.found}; {error.fix}") from None


def _names(value: Any) -> Any:
    if isinstance(value, str):
        value = [] if value == "none" else [n.strip() for n in value.split(",") if n.strip()]
    return list(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else value


Integer = Annotated[int, pydantic.BeforeValidator(_no_bool)]
Number = Annotated[float, pydantic.BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Length = Annotated[str, pydantic.AfterValidator(_duration)]
Limit = Annotated[str, pydantic.AfterValidator(_budget)]
Size = Annotated[str, pydantic.AfterValidator(_size)]
Channels = tuple[Number, Number, Number]
Trackers = Annotated[tuple[TrackerName, ...], pydantic.BeforeValidator(_names)]


class RunConfig(BaseModel):
    """The settings of one run. `None` means "chosen for this kind of task, and recorded".

    Build one with `load_config`, which turns bad values into `ConfigError`. A setting's meaning,
    unit and reason are in its field description (`RunConfig.model_fields[name].description`).

    Example:
        >>> RunConfig(model="timm:resnet18", data="photos").batch_size
        32
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        min_length=1,
        description="What to fine-tune: 'timm:NAME', 'torchvision:NAME', 'hf:NAME_OR_DIR', "
        "'keras:NAME' (of keras.applications), 'keras:FOLDER' (a KerasHub preset, texts), a .keras "
        "file, or 'package.module:callable' (called with num_classes=N).",
    )
    data: str = Field(
        min_length=1,
        description="What to learn from: a folder of class folders of images; a CSV, JSONL or "
        "Parquet file of text and labels, or a folder of train/val/test ones; or "
        "'package.module:callable'.",
    )
    policy: str = Field(
        "auto",
        min_length=1,
        description="What is frozen when: 'name:option=value'. By default read from the data "
        "(probes of every layer) and corrected by validation as training runs.",
    )
    weights: Literal["pretrained", "random"] | Path = Field(
        "pretrained",
        description="'pretrained', 'random', or a .safetensors file (for 'keras:NAME' also .h5). "
        "Pretrained by default: freezing random weights is of no use.",
    )
    head_start: Literal["random", "solved"] | None = Field(
        None,
        description="How the head starts: 'random', or 'solved': by logistic regression on what "
        "the pretrained layers put out, for the price of one pass over the data, which is where "
        "linear probing would end. By default solved under policies that look at the same data "
        "anyway (`auto`), else random.",
    )
    output: Path | None = Field(
        None,
        description="Folder the run writes into. By default a new numbered folder under 'runs', "
        "so that no run overwrites another.",
    )
    seed: Integer = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seeds head, splits, order and augmentation, 0 to 2**32-1. Fixed by default: "
        "two runs differ only by what was changed.",
    )
    epochs: Integer = Field(
        10,
        ge=1,
        le=100_000,
        description="Passes over the training data, >= 1. Ten suits hundreds to thousands of "
        "samples; early stopping ends sooner.",
    )
    budget: Limit | None = Field(
        None,
        description="The most that training may take within these epochs: updates ('500st'), "
        "time ('600s', '10min', '1.5h') or floating-point operations ('2e15flop'). The "
        "learning-rate schedule is compressed to it; in a time, `auto` freezes as much as lets "
        "all epochs fit. By default the epochs alone say when the run ends.",
    )
    memory_budget: Size | None = Field(
        None,
        description="The most memory that training may use, e.g. '2GiB': `auto` freezes as much "
        "as keeps a step within it, as far as that can be foretold. On a GPU what torch "
        "allocates, else what of the process is resident. By default no limit.",
    )
    batch_size: Integer = Field(
        32,
        ge=1,
        le=65_536,
        description="Samples per forward pass, >= 1. 32 fits small devices and trains well.",
    )
    accumulate: Integer = Field(
        1,
        ge=1,
        le=65_536,
        description="Batches whose gradients are summed per optimizer step, >= 1: a larger "
        "effective batch in the same memory.",
    )
    optimizer: Literal["adamw", "adam", "sgd"] = Field(
        "adamw",
        description="AdamW by default: least sensitive to the learning rate when fine-tuning. "
        "'sgd' uses momentum 0.9.",
    )
    lr: Number | None = Field(
        None,
        gt=0,
        le=10,
        description="Peak learning rate of the backbone, > 0. By default 3e-4 for images and "
        "1e-4 for text, whose transformers diverge at higher rates; ten times that with 'sgd'.",
    )
    head_lr: Number | None = Field(
        None,
        gt=0,
        le=10,
        description="Peak learning rate of the head, > 0. By default ten times `lr`: the head "
        "starts from random weights, the backbone only has to adapt.",
    )
    lr_decay: Number = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate per layer group towards the input, (0, 1]. 1 "
        "gives the whole backbone one rate; 0.8 is a usual discriminative choice.",
    )
    weight_decay: Number = Field(
        0.01,
        ge=0,
        le=10,
        description="Decoupled weight decay, >= 0; not applied to biases and norms. 0.01 is "
        "AdamW's usual value.",
    )
    warmup: Length = Field(
        "10%",
        description="Length of the linear warm-up: '100st', '1ep' or '10%' (of the run). A tenth "
        "keeps the first steps of a random head from hurting the backbone.",
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine",
        description="Learning rate after the warm-up. Cosine falls to 0 at the end of the run.",
    )
    clip_norm: Number | None = Field(
        1.0,
        gt=0,
        description="Largest global gradient norm, > 0, or null for no clipping. 1 stops single "
        "batches from throwing the weights away.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Arithmetic of the forward pass (autocast). fp32 by default: exact resume, "
        "and faster on most CPUs. fp16 scales the loss and wants a GPU.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="'balanced' weighs the loss by inverse class frequency; for unequal classes.",
    )
    patience: Integer | None = Field(
        3,
        ge=1,
        description="Epochs without a better validation score before stopping, >= 1, or null to "
        "run to the end. It counts afresh at each phase of the policy, and waits while the policy "
        "is to end the phase by itself. The best epoch's weights are restored either way.",
    )
    optimizer_state: Literal["keep", "release"] = Field(
        "keep",
        description="What becomes of a frozen group's optimizer state: kept for when it trains "
        "again, or released to save memory.",
    )
    live_norm: bool = Field(
        default=False,
        description="Whether normalisation statistics of frozen groups follow the new data. Held "
        "by default: frozen means unchanged.",
    )
    live_dropout: bool = Field(
        default=False,
        description="Whether dropout stays active in frozen groups. Off by default: frozen "
        "features are then the same in every epoch.",
    )
    image_size: Integer | None = Field(
        None,
        ge=8,
        le=4096,
        description="Side of the square the model sees, in pixels, 8 to 4096: the shorter side "
        "is resized to it and the centre cut out. By default the model's own preparation.",
    )
    image_mean: Channels | None = Field(
        None,
        description="Per-channel mean (R, G, B) subtracted from pixels in [0, 1]. By default the "
        "model's own.",
    )
    image_std: Channels | None = Field(
        None,
        description="Per-channel standard deviation (R, G, B) that pixels are divided by, > 0. "
        "By default the model's own.",
    )
    augment: Literal["none", "flip", "basic"] | None = Field(
        None,
        description="Random changes to training images: 'flip' (left-right), 'basic' (crop of "
        "50 to 100 % of the area, then flip) or 'none'. By default 'flip', safe for photos; choose "
        "'none' where left and right matter (digits, letters). Text has none.",
    )
    views: Integer | None = Field(
        None,
        ge=1,
        le=1024,
        description="Augmented views per training sample: new ones in the first epochs, then the "
        "same again, so that they can be cached. By default the two that 'flip' has, and with "
        "'basic' a new view in each epoch, which cannot be cached.",
    )
    cache: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the outputs of the frozen layers are kept on disk, so that later "
        "epochs run only what trains. 'auto': where that is exact and saves at least 5 % of a "
        "step; 'on': wherever it is exact. What is cached, or why not, is in the run's log.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder of the stored outputs, shared by runs. By default the user's cache "
        "folder (`frostline cache list` shows it).",
    )
    cache_limit_gib: Number = Field(
        20.0,
        gt=0,
        description="Most disk that all stored outputs in the folder may take, in GiB; those "
        "unused for longest make way. Samples beyond it are computed anew in each epoch.",
    )
    cache_dtype: Literal["exact", "bfloat16", "float16", "int8"] = Field(
        "exact",
        description="How stored numbers are kept: 'exact' as they are; the others take a half or "
        "a quarter of the disk and round.",
    )
    feature_augment: str | None = Field(
        None,
        min_length=1,
        description="Random changes of stored outputs in training, e.g. 'noise=0.1,flip'; only "
        "where they are cached.",
    )
    max_length: Integer | None = Field(
        None,
        ge=2,
        le=131_072,
        description="Longest text in tokens, >= 2; the rest is cut. By default what the model "
        "accepts, at most 512.",
    )
    pooling: Literal["model", "mean"] | None = Field(
        None,
        description="How 'hf:' text models turn tokens into one vector: 'model' (the "
        "architecture's own classifier) or 'mean' over tokens. By default what the model's folder "
        "declares: sentence encoders are trained for the mean, and classify badly without it.",
    )
    text_column: str | None = Field(
        None,
        min_length=1,
        description="Column that holds the text. By default found: text, sentence, question, ...",
    )
    label_column: str | None = Field(
        None,
        min_length=1,
        description="Column that holds the label. By default found: label, class, target, ...",
    )
    val_fraction: Number = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of the data for validation where the data has no such split, (0, 1). "
        "15 % measures well without starving training.",
    )
    test_fraction: Number = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of the data for the final test where the data has no such split, "
        "(0, 1).",
    )
    train_samples: Integer | None = Field(
        None,
        ge=2,
        le=1_000_000_000,
        description="Most training samples to use, >= 2 and one of each class: a subset with the "
        "classes in their proportions, drawn by the seed, that holds every smaller one. By "
        "default all.",
    )
    skip_bad: bool = Field(
        default=False,
        description="Whether unreadable samples are left out and counted. Off by default: a bad "
        "sample stops the run with its name.",
    )
    checkpoint_every: Length | None = Field(
        "1ep",
        description="Interval between checkpoints ('500st', '1ep', '10%'), or null for none.",
    )
    keep_checkpoints: Integer = Field(
        2,
        ge=1,
        le=1000,
        description="Newest checkpoints kept, >= 1. Two: one to fall back on.",
    )
    device: str = Field(
        "auto",
        min_length=1,
        description="'auto' (CUDA, then MPS, then CPU), or a torch device such as 'cpu', 'cuda:1'.",
    )
    threads: Integer | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads for arithmetic, >= 1. By default torch's choice.",
    )
    workers: Integer = Field(
        0,
        ge=0,
        le=256,
        description="Processes that prepare samples, >= 0. 0 prepares them in the training "
        "process: no start-up cost; results are the same for any number.",
    )
    trackers: Trackers = Field(
        (),
        description="Who is told of metrics, frozen layers, signals and decisions while it runs: "
        "any of tensorboard, mlflow, wandb, trackio (`tensorboard,mlflow`). They keep it in the "
        "run's folder. One that fails does not touch the run.",
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction + test_fraction = {self.val_fraction + self.test_fraction:g} "
                "leave nothing to train on; make them sum to less than 1"
            )
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"image_std {self.image_std}: each value must be above 0")
        if self.feature_augment is not None:
            if self.cache == "off":
                raise ValueError("feature_augment works on cached outputs; leave out cache: off")
            # It needs torch, which reading settings does not.
            from frostline.frontier.feature_augment import read_feature_augment  # noqa: PLC0415

            try:
                read_feature_augment(self.feature_augment)
            except ConfigError as error:
                raise ValueError(f"{error.found}; {error.fix}") from None
        return self


def budget_bytes(config: RunConfig) -> int | None:
    """Bytes of the memory budget, None where there is none.

    Example:
        >>> budget_bytes(RunConfig(model="m", data="d", memory_budget="2 GiB"))
        2147483648
    """
    return None if config.memory_budget is None else _size_of(config.memory_budget)


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Merge a YAML file and overrides into a checked configuration; overrides win.

    Args:
        path: YAML file of settings, at most 1 MB, or None for none.
        overrides: settings by name, as from a command line.

    Raises:
        ConfigError: no such file, not plain YAML, unknown setting, wrong type or value, or a
            contradiction; names the setting and the line.

    Example:
        >>> load_config(None, {"model": "timm:resnet18", "data": "photos", "lr": "1e-3"}).lr
        0.001
    """
    given = strict_yaml.Document({}, {})
    if path is not None:
        given = strict_yaml.parse(_read(Path(path)), source=str(path))
    overrides = dict(overrides or {})
    lines = {key: line for key, line in given.lines.items() if key not in overrides}
    places = {key: f" ({path}, line {line})" for key, line in lines.items()}
    values = {**given.values, **overrides}
    for key in values:
        if key not in RunConfig.model_fields:
            raise _unknown(key, places.get(key, ""))
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise _invalid(error, values, places) from None


def dump_config(config: RunConfig) -> str:
    """The settings as YAML; `load_config` on it gives an equal configuration.

    Example:
        >>> dump_config(RunConfig(model="timm:resnet18", data="photos")).splitlines()[0]
        'model: timm:resnet18'
    """
    return strict_yaml.dump(config.model_dump(mode="json"))


def resolve_config(config: RunConfig, kind: Kind) -> RunConfig:
    """The configuration with every choice made that depends on the kind of task.

    Example:
        >>> resolve_config(RunConfig(model="hf:bert", data="a.csv"), "text").lr
        0.0001
    """
    usual = {"image": 3e-4, "text": 1e-4}[kind] * (10 if config.optimizer == "sgd" else 1)
    rate = config.lr if config.lr is not None else usual
    head_rate = min(10.0, round(10 * rate, 12))
    found = {
        "lr": rate,
        "head_lr": config.head_lr if config.head_lr is not None else head_rate,
        "augment": config.augment or {"image": "flip", "text": "none"}[kind],
    }
    found["views"] = config.views or {"none": 1, "flip": 2, "basic": None}[str(found["augment"])]
    if kind == "text" and found["augment"] != "none":
        raise ConfigError(
            f"augment text by {config.augment!r}",
            found="a text task, for which there is no augmentation",
            fix="leave 'augment' out",
        )
    return config.model_copy(update=found)


def _read(path: Path) -> str:
    fix = "a YAML text file in UTF-8, such as the config.yaml of an earlier run"
    try:
        if path.stat().st_size > strict_yaml.MAX_BYTES:
            found = f"{path.stat().st_size:,} bytes, more than {strict_yaml.MAX_BYTES:,}"
            raise ConfigError(f"read {path}", found=found, fix=fix)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the name
        raise ConfigError(f"read {path}", found=str(error), fix=fix) from error


def _unknown(key: str, place: str) -> ConfigError:
    near = difflib.get_close_matches(key, RunConfig.model_fields, n=1)
    return ConfigError(
        f"set {key!r}{place}",
        found="no setting of that name" + (f"; did you mean {near[0]!r}?" if near else ""),
        fix=f"one of {', '.join(RunConfig.model_fields)}",
    )


def _invalid(
    error: pydantic.ValidationError, values: Mapping[str, Any], places: Mapping[str, str]
) -> ConfigError:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if not first["loc"]:
        return ConfigError(
            "use these settings together",
            found=first["msg"].removeprefix("Value error, "),
            fix="change one of them",
        )
    key = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ConfigError("configure a run", found=f"no {key!r}", fix=f"{key}: {_meaning(key)}")
    about = [p["msg"].removeprefix("Value error, ") for p in problems if p["loc"][0] == key]
    return ConfigError(
        f"set {key} to {_shown(values[key])}{places.get(key, '')}",
        found="; or ".join(dict.fromkeys(about)),
        fix=f"{key}: {_meaning(key)}",
    )


def _meaning(key: str) -> str:
    field = RunConfig.model_fields[key]
    allowed = [v for v in get_args(field.annotation) if isinstance(v, str)]
    choice = f" One of {', '.join(allowed)}." if allowed else ""
    return f"{field.description}{choice}"


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:200]
    except (TypeError, ValueError):
        return repr(value)[:200]
