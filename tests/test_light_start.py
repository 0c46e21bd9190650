"""Starting is light: neither the package nor the command line loads a numeric library before it is needed.

How long a start takes is measured by ``benchmarks/startup.py``; here is only what decides it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "scipy", "numba", "tokenizers", "huggingface_hub", "pandas", "sklearn")


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint('|'.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.strip().splitlines()[-1].split("|"))


@pytest.mark.parametrize(
    "code",
    [
        "import layerwise",
        "import layerwise.cli.main",
        "import layerwise.technique as t; assert t.technique_files()",
        "import layerwise; dir(layerwise)",
    ],
    ids=["package", "command line", "list of techniques", "names of the package"],
)
def test_no_numeric_library_is_loaded(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"]], ids=" ".join)
def test_help_loads_no_numeric_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['layerwise', *{arguments!r}]\n"
        "from layerwise.cli.main import main\n"
        "try:\n    status = main()\nexcept SystemExit as stop:\n    status = stop.code\n"
        "assert not status, status"
    )
    assert not loaded_after(code) & set(HEAVY)
