"""The list of sub-commands, and how whatever goes wrong becomes one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cyclopts import App, CycloptsError

from frostline._version import __version__
from frostline.cli.terminal import WarningsHere, console, escape
from frostline.errors import FrostlineError

__all__ = ["app", "run"]


@dataclass(frozen=True, slots=True)
class _Command:
    """A sub-command: its module is imported when it is called."""

    name: str
    about: str
    examples: tuple[str, ...]

    @property
    def function(self) -> str:
        name = self.name.replace("-", "_")
        return "list_" if name == "list" else name  # `list` has a meaning already


_COMMANDS = (
    _Command(
        "choose",
        "Rank pretrained models for your data, before any training.",
        (
            "frostline choose photos/ timm:resnet18 timm:efficientnet_lite0",
            "frostline choose reviews.csv hf:./minilm hf:./minilm,weights=random --no-costs",
        ),
    ),
    _Command(
        "inspect",
        "Show the layer groups of a model and what freezing each would save.",
        (
            "frostline inspect timm:resnet18 --weights random",
            "frostline inspect torchvision:vgg11_bn --weights random --batch-size 8 --json",
        ),
    ),
    _Command(
        "fit",
        "Fine-tune a model on your data under a freezing policy.",
        (
            "frostline fit timm:resnet18 photos/ --policy gradual:every=1ep",
            "frostline fit hf:./minilm reviews.csv --policy linear-probe --epochs 5",
            "frostline fit --config run.yaml --lr 1e-4 --print-config",
        ),
    ),
    _Command(
        "compare",
        "Compare freezing policies fairly: several seeds, one budget, controls, intervals.",
        (
            "frostline compare timm:resnet18 photos/ --policies full linear-probe gradual",
            "frostline compare timm:resnet18 photos/ --policies full egeria --controls placebo",
            "frostline compare hf:./minilm reviews.csv --seeds 5 --epochs 5 --margin 0.005",
        ),
    ),
    _Command(
        "study",
        "Read a study's records again: another reference, margin or level; nothing is run.",
        ("frostline study studies/photos-resnet18", "frostline study STUDY --reference gradual"),
    ),
    _Command(
        "sweep",
        "Try many policies with one seed; most are stopped early.",
        ("frostline sweep timm:resnet18 photos/ --policies linear-probe full --output sweeps/1",),
    ),
    _Command(
        "learning-curve",
        "Accuracy by number of training samples: when does freezing stop helping?",
        (
            "frostline learning-curve timm:resnet18 photos/ --policies full linear-probe",
            "frostline learning-curve timm:resnet18 photos/ --sizes 100 400 100% --seeds 5",
        ),
    ),
    _Command(
        "diagnose",
        "Say what limits a run, from what evidence, and what to do next.",
        (
            "frostline diagnose RUN",
            "frostline diagnose RUN --reference OTHER THIRD --probe --save",
            "frostline diagnose studies/photos-resnet18/runs/full --curve studies/photos-curve",
        ),
    ),
    _Command(
        "report",
        "Write one page on runs or a study: what was frozen, when, why, and what it bought.",
        (
            "frostline report studies/photos-resnet18",
            "frostline report RUN ANOTHER_RUN --output both.html --samples",
            "frostline report RUN --figures figures/",
        ),
    ),
    _Command(
        "show",
        "Show one run here: result, timeline of freezing, decisions, times.",
        ("frostline show runs/resnet18-gradual-001", "frostline show RUN --decisions 0"),
    ),
    _Command(
        "predict",
        "Print labels and probabilities for new inputs, from a finished run.",
        (
            "frostline predict RUN new.jpg other.png --top 3",
            "frostline predict RUN @questions.txt --json",
        ),
    ),
    _Command(
        "export",
        "Write the tuned Keras model of a run as a .keras file.",
        ("frostline export runs/MobileNet-auto-001 flowers.keras",),
    ),
    _Command(
        "watch",
        "Serve a page of a run that follows it while it trains, on this machine only.",
        ("frostline watch runs/resnet18-gradual-001", "frostline watch --open"),
    ),
    _Command(
        "runs",
        "List the runs in a folder side by side.",
        ("frostline runs", "frostline runs runs/demo --json"),
    ),
    _Command(
        "policies",
        "List the freezing policies, or show one with its options.",
        ("frostline policies", "frostline policies gradual"),
    ),
)

_CACHE_COMMANDS = (
    _Command(
        "list",
        "List the entries: state, size, rows, when they were last used, what they are.",
        ("frostline cache list", "frostline cache list --folder /data/stores --json"),
    ),
    _Command(
        "inspect",
        "Show what an entry depends on, and why it would or would not be used here and now.",
        ("frostline cache inspect 3f9a", "frostline cache inspect 3f9a --versus 77b1"),
    ),
    _Command(
        "prune",
        "Remove entries that nobody uses; what they held is computed again when it is needed.",
        (
            "frostline cache prune --older-than 30d --keep-bytes 10GiB",
            "frostline cache prune --damaged --dry-run",
            "frostline cache prune 3f9a",
        ),
    ),
    _Command(
        "verify",
        "Read every row of these entries, or of all, and compare its checksum.",
        ("frostline cache verify", "frostline cache verify 3f9a"),
    ),
)


def _examples(lines: Iterable[str]) -> str:
    return "\n".join(("Examples:", "", *(f"    {line}" for line in lines)))


def _group(name: str, about: str, commands: Sequence[_Command]) -> App:
    return App(
        name=name,
        help=about,
        help_epilogue=_examples(command.examples[0] for command in commands),
        help_format="plaintext",
        version=__version__,
        suppress_keyboard_interrupt=False,
    )


app = _group(
    "frostline",
    "Fine-tune with layers frozen: frozen means frozen, measured, and chosen on evidence.",
    _COMMANDS,
)
_cache = _group("cache", "What is stored of frozen regions.", _CACHE_COMMANDS)
for _parent, _module, _commands in ((app, "", _COMMANDS), (_cache, "cache", _CACHE_COMMANDS)):
    for _command in _commands:
        _parent.command(
            f"frostline.cli.{_module or _command.function}:{_command.function}",
            name=_command.name,
            help=_command.about,
            help_epilogue=_examples(_command.examples),
        )
app.command(_cache)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code is returned, every message already printed."""
    log, handler = logging.getLogger("frostline"), WarningsHere(logging.WARNING)
    log.addHandler(handler)
    try:
        return _run(arguments)
    finally:
        log.removeHandler(handler)


def _run(arguments: Sequence[str]) -> int:
    try:
        app(
            ["@-" if a == "-" else a for a in arguments],  # a lone "-" would read as an option
            result_action="return_value",
            exit_on_error=False,
            print_error=False,
        )
        sys.stdout.flush()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); the interpreter must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost frame
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    if os.environ.get("FROSTLINE_DEBUG") == "1":
        traceback.print_exception(error)
    match error:
        case CycloptsError():
            lines, code = _usage(error), 2
        case FrostlineError():
            lines, code = str(error).splitlines(), error.exit_code
        case KeyboardInterrupt():
            lines, code = ["interrupted"], 130
        case _:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            lines, code = [f"unexpected {what}; set FROSTLINE_DEBUG=1 for the traceback"], 1
    out = console(sys.stderr)
    for line in lines:
        out.print(escape(line), soft_wrap=True)
    return code


def _usage(error: CycloptsError) -> list[str]:
    error.verbose = False
    return str(
        FrostlineError(
            "read the command line",
            found=" ".join(str(error).split()),
            fix=" ".join(("frostline", *(error.command_chain or ()), "--help")),
        )
    ).splitlines()
