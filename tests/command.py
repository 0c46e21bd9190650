"""Running the command line inside the test process, and the options that keep a run small."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Seconds rather than minutes: 1536 tokens, one thread, one worker.
SMALL = ("--sequences", "48", "--length", "32", "--threads", "1", "--workers", "1")
PROGRESS = re.compile(r"[a-z ]+[a-z0-9:=,._ ]*: [0-9.]+ s")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """Lines on standard error that are not progress (``forward pass: 0.2 s``)."""
        return [line for line in self.err.splitlines() if line and not PROGRESS.fullmatch(line)]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def layerwise(*arguments: str | Path) -> Done:
    """``layerwise ARGUMENTS`` in this process."""
    from layerwise.cli.main import main

    before, code = signal.getsignal(signal.SIGTERM), 0
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["layerwise", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, before)
    return Done(code, out.getvalue(), err.getvalue())


def compress(
    model: str | Path, out: str | Path, text: Path, *options: str | Path, small: Sequence[str] = SMALL
) -> Done:
    """``layerwise compress`` with the options that keep it small; a failure shows what the command said."""
    return layerwise("compress", model, out, "--calibrate", text, *small, *options)


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
