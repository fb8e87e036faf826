"""Hypothesis strategies for the core's types."""

from __future__ import annotations

from hypothesis import strategies as st

from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.testing import example_groups

GROUPS: LayerGroups = example_groups(5)


@st.composite
def plans(draw: st.DrawFn) -> FreezePlan:
    """Plans over `GROUPS`, including ones that freeze everything."""
    some = st.frozensets(st.sampled_from(GROUPS.names))
    frozen = draw(some)
    exempt = {
        name: draw(st.frozensets(st.sampled_from(sorted(GROUPS[name].parameter_names))))
        for name in sorted(frozen)
    }
    scales = draw(
        st.dictionaries(st.sampled_from(GROUPS.names), st.floats(0, 4, allow_nan=False), max_size=3)
    )
    return FreezePlan(
        frozen,
        exempt,
        scales,
        live_norm=draw(some),
        live_dropout=draw(some),
        released=draw(some),
        phase=draw(st.integers(0, 3)),
        keep_best=draw(st.sampled_from(["", "min val_loss", "max val_accuracy"])),
        done=draw(st.booleans()),
        reason=draw(st.text(max_size=5)),
    )
