"""Runs compared: under one budget, by seed, with intervals, and what follows from them."""

from __future__ import annotations

import importlib.util

from frostline.errors import MissingExtra

for _name in ("optuna", "scipy", "sklearn"):
    if importlib.util.find_spec(_name) is None:
        raise MissingExtra(
            "compare or choose",
            found=f"no package {_name!r} in this Python",
            fix="pip install 'frostline[study]'",
        )
