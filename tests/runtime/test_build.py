"""The package is built with kernels where there is a compiler, and without them where there is none."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def wheel_of(tmp_path, **environment):
    """The wheel that pip makes of a copy of the sources, and what was said."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("_native.so", "__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith("_native.so")]
    return wheel, names, done.stdout + done.stderr


def test_a_wheel_with_kernels_is_small_and_of_this_platform(compiled, tmp_path):
    wheel, names, _ = wheel_of(tmp_path)
    assert names == ["secateur/runtime/_native.so"]
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert wheel.stat().st_size < 2 * 2**20


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"SECATEUR_NO_NATIVE": "1"}, "SECATEUR_NO_NATIVE is set"),
        ({"PATH": "", "CXX": ""}, "there is no C++ compiler"),
        ({"CXX": f"{sys.executable} -c exit(3)"}, "failed: no message"),
    ],
)
def test_without_a_compiler_the_wheel_is_plain_and_says_so(tmp_path, environment, why):
    wheel, names, said = wheel_of(tmp_path, **environment)
    assert names == []
    assert wheel.name.endswith("-py3-none-any.whl")
    assert why in " ".join(said.split())
    assert "Sparse layers will compute with torch" in " ".join(said.split())
