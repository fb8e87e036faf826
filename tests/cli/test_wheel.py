"""What is built is whole: types are marked, the command and the policies are registered."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from frostline import __version__
from frostline.registry import available_combinators, available_policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv, which `make setup` installs")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [uv, "build", "--wheel", "--out-dir", out, ROOT],
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode and ("dns error" in done.stderr or "onnect" in done.stderr):
        pytest.skip("needs the package index for the build backend")
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_module_the_evidence_and_the_type_marker_are_inside(wheel):
    inside = {name for name in wheel.namelist() if name.startswith("frostline/")}
    ours = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/frostline").rglob("*")
        if path.suffix in (".py", ".typed", ".json", ".html", ".css", ".js")
    }
    assert ours == inside
    assert "frostline/py.typed" in inside


def test_the_command_and_the_policies_are_registered(wheel):
    points = configparser.ConfigParser(delimiters=("=",))
    points.optionxform = str  # type: ignore[assignment]
    name = f"frostline-{__version__}.dist-info/entry_points.txt"
    points.read_string(wheel.read(name).decode())
    assert points["console_scripts"]["frostline"] == "frostline.cli:main"
    assert dict(points["frostline.policies"]) == dict(available_policies())
    assert dict(points["frostline.combinators"]) == dict(available_combinators())


def test_the_licence_is_inside(wheel):
    assert f"frostline-{__version__}.dist-info/licenses/LICENSE" in wheel.namelist()
