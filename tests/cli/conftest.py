"""Ways to call the command: in this process, and as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from frostline.cli.app import run

#: One thread and no network, whatever the machine: what the tests assert does not depend on speed.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call of the command did."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Call the command in this process."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FROSTLINE_DEBUG", raising=False)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def process() -> Callable[..., Outcome]:
    """Call the command as a process of its own."""

    def call(
        *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-c", "from frostline.cli import main; main()", *map(str, arguments)],
            capture_output=True,
            check=False,
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
            text=True,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call
