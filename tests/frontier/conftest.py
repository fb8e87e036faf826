"""The zoo fills one list on import: collecting its files for examples would do so twice."""

from __future__ import annotations

collect_ignore_glob = ["zoo*.py"]
