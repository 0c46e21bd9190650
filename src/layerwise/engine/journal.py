"""The journal of a run: what is finished, so that the same command continues where it was killed.

A work folder belongs to one run: its ``identity`` is a hash of weights, tokens, options, seed, versions and threads.
Entries are lines of JSON, one finished unit each, written whole and flushed to the disk before the next unit begins;
a half-written last line is what a kill leaves, and is dropped. Only the process that holds the lock writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import InputError


def identity_of(parts: Mapping[str, Any]) -> str:
    """Hash of everything that decides a run's result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Journal:
    """The finished units of one work folder."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._texts: dict[str, str] = {}  # as text: a large network's entries are a tenth of the size they have parsed
        stamp = folder / "identity"
        _check_owner(folder, stamp, identity)  # before the lock is made: a folder that is refused stays as it was
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"another run is using the work folder {folder}; wait for it or give another --work"
            ) from None
        if not stamp.is_file():
            _write_whole(stamp, identity + "\n")
        self._load()

    def _load(self) -> None:
        path = self.folder / "journal.jsonl"
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    unit, value = entry["unit"], entry["value"]
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self._texts[unit] = json.dumps(value)
                whole += len(line)
            with path.open("r+b") as file:
                file.truncate(whole)
        self._file = path.open("ab")

    @property
    def entries(self) -> dict[str, Any]:
        """All units and their values, parsed anew."""
        return {unit: json.loads(text) for unit, text in self._texts.items()}

    def has(self, unit: str) -> bool:
        return unit in self._texts

    def __getitem__(self, unit: str) -> Any:
        return json.loads(self._texts[unit])

    def record(self, unit: str, value: Any) -> None:
        """Note a finished unit; on disk when this returns."""
        text = json.dumps(value)
        self._file.write(_line(unit, text).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._texts[unit] = text

    def forget(self, unit: str) -> None:
        """Drop a unit, to be done again."""
        if unit not in self._texts:
            return
        del self._texts[unit]
        self._file.close()
        lines = "".join(_line(u, text) for u, text in self._texts.items())
        _write_whole(self.folder / "journal.jsonl", lines)
        self._file = (self.folder / "journal.jsonl").open("ab")

    def close(self, remove: bool = False) -> None:
        self._file.close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _line(unit: str, text: str) -> str:
    return f'{{"unit": {json.dumps(unit)}, "value": {text}}}\n'


def _check_owner(folder: Path, stamp: Path, identity: str) -> None:
    """``InputError`` unless the folder is absent, empty, or of this very run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the work folder {folder} is a file; give --work a directory")
    if stamp.is_file():
        if stamp.read_text(errors="replace").strip() != identity:
            raise InputError(
                f"the work folder {folder} belongs to another run (other network, text, options, seed, versions or "
                f"threads); give another --work or remove it"
            )
    elif folder.is_dir() and any(p.name not in ("lock", stamp.with_suffix(".part").name) for p in folder.iterdir()):
        raise InputError(f"the work folder {folder} holds files that are not layerwise's; give an empty one")


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
