"""Build hook: compiles the kernels of `secateur.runtime` with the C++ compiler at hand.

They are a plain shared library, called through its C interface: no Python and no torch headers, one build for
every version of both. Without a compiler the package installs all the same and computes with torch.

Environment: CXX names the compiler, CXXFLAGS adds flags (a sanitizer, say), SECATEUR_NO_NATIVE=1 leaves the
kernels out.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("src/secateur/runtime/native")
LIBRARY = Path("src/secateur/runtime/_native.so")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w"]
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt", "-mtune=znver3"]
AVX512F = [*AVX2, "-mavx512f"]
VBMI2 = [*AVX512F, "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2"]
# One file, one instruction set: dispatch is at run time.
X86 = {
    "avx2": AVX2,
    "avx2_batch": AVX2,
    "avx512f": AVX512F,
    "avx512vbmi2": VBMI2,
    "avx512bf16": [*VBMI2, "-mavx512bf16"],
}
SETS = {"x86_64": X86, "amd64": X86}


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before a wheel is put together, an editable one included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / LIBRARY
        library.unlink(missing_ok=True)
        try:
            build(root / SOURCES, library)
        except NotBuilt as reason:
            self.app.display_warning(
                f"secateur: installing without compiled kernels ({reason}). Sparse layers will compute with "
                "torch: everything works, nothing is faster. Install a C++17 compiler and reinstall for them."
            )
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"


class NotBuilt(Exception):
    """Why there are no kernels."""


def build(sources: Path, library: Path) -> None:
    """Compile and link; `NotBuilt` with one sentence if that cannot be."""
    if os.environ.get("SECATEUR_NO_NATIVE", "") not in ("", "0"):
        raise NotBuilt("SECATEUR_NO_NATIVE is set")
    if sys.platform == "win32":
        raise NotBuilt("the build knows no compiler of Windows yet")
    compiler = next(
        (
            c
            for c in (os.environ.get("CXX"), "c++", "g++", "clang++")
            if c and shutil.which(shlex.split(c)[0])
        ),
        None,
    )
    if compiler is None:
        raise NotBuilt("there is no C++ compiler")
    command = [*shlex.split(compiler), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    sets = SETS.get(platform.machine().lower(), {})
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(sources.glob("*.cpp"))
        objects = [str(Path(folder) / f"{f.stem}.o") for f in files]

        def compiled(file: Path, made: str) -> None:
            plain = ["-c", str(file), "-o", made]
            try:
                _run([*command, *sets.get(file.stem, []), *plain])
            except NotBuilt:  # an old compiler does not know the newest sets: the file is empty without them
                if file.stem not in sets:
                    raise
                _run([*command, *plain])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compiled, files, objects))
        made = str(Path(folder) / library.name)
        link = [*command, "-shared", "-pthread", *objects, "-o", made]
        try:  # so that the library runs where the compiler's own libraries are older or missing
            _run([*link, "-static-libstdc++", "-static-libgcc", "-s"])
        except NotBuilt:
            _run(link)
        shutil.copyfile(made, library)
        library.chmod(0o755)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NotBuilt(f"{command[0]} failed: {lines[0].strip() if lines else 'no message'}")
