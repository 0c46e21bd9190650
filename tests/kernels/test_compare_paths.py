"""The program that compares the library's paths where there is no Python, run here on those of this processor.

It holds the bits of all results as one number, which an emulated processor must come to as well (``make neon-test``).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.kernels.library import library, paths, why_absent

pytestmark = [
    pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a library for Python cannot be linked to a program"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the program is not built with sanitizers"),
]

PROGRAM = Path(__file__).parent / "native" / "compare_paths.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no {compiler[0]} to compile the program with")
    loaded = library()
    assert loaded is not None
    built = Path(loaded._name).resolve()
    headers = Path(__file__).parents[2] / "src/layerwise/kernels/native"
    out = tmp_path_factory.mktemp("program") / "compare_paths"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{headers}"]
    linked = [str(built), f"-Wl,-rpath,{built.parent}", "-o", str(out)]
    subprocess.run([*compiler, *flags, str(PROGRAM), *linked], check=True, timeout=300)
    return out


def test_every_path_has_the_bits_of_the_portable_one(program: Path):
    done = subprocess.run([program, *paths()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == f"paths: {', '.join(paths())}" and ", 0 differ;" in done.stdout


def test_it_fails_where_the_paths_are_others(program: Path):
    done = subprocess.run([program, "nowhere"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "the paths are not those that were named" in done.stdout
