"""The reader of GGUF files: what the writer wrote, and nothing but an ``InputError`` for anything else."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import InputError
from layerwise.network.gguf_checkpoint import open_gguf
from layerwise.network.gguf_file import read_header, write

VALUES = {"general.architecture": "llama", "a": 7, "b": 0.5, "c": True, "d": ["x", "ÿ"], "e": [1, -2], "f": [0.5]}


def small(path: Path) -> Path:
    data = {"one": np.arange(64, dtype=np.float32), "two": np.zeros((3, 18), np.uint8)}
    write(path, VALUES, {"one": ("F32", (64,)), "two": ("Q4_0", (3, 32))}, lambda name: [data[name]])
    return path


def test_what_was_written_is_read(tmp_path: Path):
    values, tensors = read_header(small(tmp_path / "x.gguf"))
    assert values == VALUES
    assert {name: (t.kind.name, t.shape, t.nbytes) for name, t in tensors.items()} == {
        "one": ("F32", (64,), 256),
        "two": ("Q4_0", (3, 32), 54),
    }
    start = tensors["one"].start
    assert np.array_equal(np.fromfile(tmp_path / "x.gguf", np.float32, 64, offset=start), np.arange(64))


def test_the_package_reads_it_too(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(small(tmp_path / "x.gguf"))
    assert {t.name for t in reader.tensors} == {"one", "two"}
    assert reader.fields["d"].contents() == ["x", "ÿ"] and reader.fields["a"].contents() == 7


def test_every_prefix_is_truncated(tmp_path: Path):
    whole = small(tmp_path / "x.gguf").read_bytes()
    for length in range(0, len(whole) - 32, 7):
        (tmp_path / "y.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_header(tmp_path / "y.gguf")


def test_damage_is_an_error_or_another_sound_header(tmp_path: Path):
    whole, draw = small(tmp_path / "x.gguf").read_bytes(), random.Random(5)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(400)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        (tmp_path / "y.gguf").write_bytes(content)
        for opened in (read_header, open_gguf):
            try:
                opened(tmp_path / "y.gguf")
            except InputError as reason:
                assert "\n" not in str(reason)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50), "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 20), "truncated"),
    ],
)
def test_claims_are_checked_before_they_are_believed(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_header(tmp_path / "x.gguf")
