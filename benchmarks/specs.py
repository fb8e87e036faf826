"""Which policies the benchmarks run, and with which options: one table for all of them."""

from __future__ import annotations

from collections.abc import Mapping

from frostline.registry import available_policies

__all__ = ["EXCUSED", "OWN_RATES", "SPECS", "chosen", "default_specs", "unlisted"]

#: What stands for each registered policy. Defaults unless the run of the benchmark (10 epochs of
#: 25 steps) needs another length, or the policy has an option without a default.
SPECS: Mapping[str, str] = {
    "full": "full",
    # static
    "all-but-norm": "all-but-norm",
    "bitfit": "bitfit",
    "first": "first:fraction=0.5",
    "freeze": "freeze:select=conv1 | layer1.*",
    "last": "last:fraction=0.5",
    "linear-probe": "linear-probe",
    "spectrum": "spectrum",
    "train-only": "train-only:select=layer3.*",
    # by the clock
    "composer-linear": "composer-linear",
    "freeze-training": "freeze-training",
    "freezeout": "freezeout",
    "gradual": "gradual:until=50%",
    "spfde": "spfde",
    "ulmfit": "ulmfit:until=50%,factor=1.3",  # 2.6 per group would all but stop a stem 10 deep
    "wav2vec2": "wav2vec2",
    # by phases and validation
    "chain-thaw": "chain-thaw:length=8%",  # 12 phases; its patience wants far longer runs
    "fine-tune": "fine-tune",
    "lp-ft": "lp-ft",
    "plateau": "plateau",
    # by turns
    "badam": "badam:every=5%",  # two sweeps; 50 steps would not be one
    "hift": "hift",
    "lisa": "lisa",
    # by importance and cost
    "al-sar": "al-sar",
    "auto-rgn": "auto-rgn",
    "auto-snr": "auto-snr",
    "elastic": "elastic",
    "fim": "fim",
    # by gradients, activations, changes of weights
    "apf": "apf",
    "autofreeze": "autofreeze",
    "egeria": "egeria:every=2%",  # the default would read at every step of so short a run
    "etuner": "etuner",
    "grades": "grades",
    "pipetransformer": "pipetransformer",
    "slimfit": "slimfit",
}

#: Policies that the evidence leaves out, and why.
EXCUSED: Mapping[str, str] = {
    "auto": "it looks at the data through `fit`; `benchmarks/auto.py` holds it against a sweep",
    "probe-depth": "it looks at the data through `fit`; it is where `auto` begins",
    "freeze-embeddings": "the network of these experiments has no embeddings",
    "phases": "its phases are whatever the user's file says",
}

#: Policies that schedule the learning rate by themselves: the optimizer's own stays constant.
OWN_RATES = frozenset({"freezeout", "spfde", "ulmfit"})

#: Policies that cannot do without an option, for the benchmarks of default settings.
_REQUIRED: Mapping[str, str] = {
    "first": "first:fraction=0.5",
    "freeze": "freeze:select=first 50%",
    "last": "last:fraction=0.5",
    "train-only": "train-only:select=kind:bias",
}

#: Policies that the benchmarks of default settings leave out, by model.
_UNSUITED: Mapping[str, frozenset[str]] = {
    "resnet20": frozenset({"freeze-embeddings", "phases"}),
    "bert": frozenset({"phases"}),
    "noise": frozenset({"freeze-embeddings", "phases"}),
}


def unlisted() -> list[str]:
    """Registered policies that neither have a spec nor are excused."""
    return sorted(set(available_policies()) - SPECS.keys() - EXCUSED.keys())


def chosen(only: list[str] | None) -> dict[str, str]:
    """The specs to run, by name of the policy: all registered ones, or those named.

    Raises:
        SystemExit: a registered policy is not listed, or a name is unknown.
    """
    if missing := unlisted():
        raise SystemExit(f"list these policies in specs.py, or excuse them: {', '.join(missing)}")
    known = {name: spec for name, spec in SPECS.items() if name in available_policies()}
    if unknown := sorted(set(only or ()) - known.keys()):
        raise SystemExit(f"no such policy here: {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: spec for name, spec in known.items() if not only or name in only}


def default_specs(model: str) -> dict[str, str]:
    """Every registered policy that can run on the model, at default settings."""
    left_out = _UNSUITED.get(model, frozenset())
    return {n: _REQUIRED.get(n, n) for n in available_policies() if n not in left_out}
