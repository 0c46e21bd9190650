"""The container GGUF, version 3: writing it to the same bytes every time, and reading files that may be hostile.

    ┌──────┬─────────┬────────────────┬────────────┬─────────────────────┬────────────┬─────┬─────────────────┐
    │ GGUF │ version │ tensors: count │ key: count │ keys and values     │ tensors:   │ gap │ tensors, each   │
    │ 4 B  │ u32 = 3 │ u64            │ u64        │ name, type, value   │ name, type │     │ at a multiple   │
    │      │         │                │            │                     │ sides, at  │     │ of 32           │
    └──────┴─────────┴────────────────┴────────────┴─────────────────────┴────────────┴─────┴─────────────────┘

Little-endian. Texts are a u64 length and UTF-8. A tensor's sides are written innermost first, columns before rows.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from layerwise.encoding.ggml_blocks import BY_NUMBER, TYPES, BlockType
from layerwise.errors import InputError
from layerwise.network.safetensors_file import sync_folder

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MOST_ENTRIES = 1 << 20  # tensors or keys; a file that claims more is damage
LARGEST_TEXT = 1 << 24
LARGEST_ARRAY = 1 << 24
MOST_SIDES = 4
LARGEST_SIDE = 1 << 40

Value = bool | int | float | str | list[str] | list[int] | list[float]
"""Written as bool, u32, f32, text, or an array of text, i32 or f32."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its shape as torch has it (rows first), and where its bytes lie."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int


def tensor_bytes(kind: BlockType, shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape[:-1]:
        count *= side
    return count * kind.row_bytes(shape[-1])


# ---------------------------------------------------------------- writing


def write(
    path: Path,
    values: Mapping[str, Value],
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    produce: Callable[[str], Iterable[NDArray[Any]]],
) -> int:
    """Write a file and return its size in bytes; it appears under its name only when it is complete and on disk.

    layout:  tensor -> (type, shape), in the order of the file.
    produce: called once for each tensor, in that order; yields its bytes in pieces of any size.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(layout), len(values))]
    head += [_text(key) + _value(value) for key, value in values.items()]
    position = 0
    for name, (kind, shape) in layout.items():
        sides = tuple(reversed(shape))
        head.append(_text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, TYPES[kind].number, position))
        position += _padded(tensor_bytes(TYPES[kind], shape))
    header = b"".join(head)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(header + bytes(_padded(len(header)) - len(header)))
            for name, (kind, shape) in layout.items():
                expected, written = tensor_bytes(TYPES[kind], shape), 0
                for piece in produce(name):
                    written += stream.write(np.ascontiguousarray(piece).view(np.uint8).data)
                if written != expected:
                    raise ValueError(f"{name} was announced with {expected} bytes and produced with {written}")
                stream.write(bytes(_padded(expected) - expected))
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return size


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    first = value[0]
    kind, code = (_TEXT, "") if isinstance(first, str) else (5, "i") if isinstance(first, int) else (6, "f")
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    if kind == _TEXT:
        return head + b"".join(_text(str(item)) for item in value)
    return head + struct.pack(f"<{len(value)}{code}", *value)


# ---------------------------------------------------------------- reading


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Values and tensors of a file. Raises ``InputError`` in one sentence for anything malformed."""
    try:
        with open(path, "rb") as stream:
            return _Reader(path, stream).header()
    except OSError as reason:
        raise InputError(f"{path} cannot be read: {reason.strerror or reason}") from None


class _Reader:
    """Reads forward through a header; whatever a length claims is checked against the file before it is read."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.left = self.size = os.fstat(stream.fileno()).st_size

    def header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self.take(4) != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file: it does not begin with the letters GGUF")
        (version,) = self.numbers("I")
        if version not in (2, VERSION):
            raise InputError(f"{self.path} is GGUF of version {version}; layerwise reads versions 2 and {VERSION}")
        tensors, keys = self.numbers("QQ")
        if max(tensors, keys) > MOST_ENTRIES:
            raise self.wrong(f"it claims {tensors} tensors and {keys} keys")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in values:
                raise self.wrong(f"key {key!r} occurs twice")
            values[key] = self.value(self.numbers("I")[0])
        listed = [self.tensor() for _ in range(tensors)]
        align = values.get("general.alignment", ALIGNMENT)
        if type(align) is not int or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise self.wrong(f"its alignment {align!r} is no sensible power of two")
        position = self.size - self.left
        data = -(-position // align) * align
        return values, self.placed(listed, data, align)

    def placed(self, listed: list[tuple[str, BlockType, tuple[int, ...], int]], data: int, align: int):  # type: ignore[no-untyped-def]
        found: dict[str, GgufTensor] = {}
        reached = data
        for name, kind, shape, offset in sorted(listed, key=lambda entry: entry[3]):
            start, nbytes = data + offset, tensor_bytes(kind, shape)
            if name in found:
                raise self.wrong(f"tensor {name!r} occurs twice")
            if offset % align or start < reached:
                raise self.wrong(f"tensor {name!r} is misplaced or overlaps the one before it")
            if start + nbytes > self.size:
                raise InputError(f"{self.path} is truncated: tensor {name!r} reaches beyond its end")
            reached = start + nbytes
            found[name] = GgufTensor(name, kind, shape, start, nbytes)
        return found

    def tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self.text()
        (count,) = self.numbers("I")
        if not 1 <= count <= MOST_SIDES:
            raise self.wrong(f"tensor {name!r} has {count} sides")
        shape = tuple(reversed(self.numbers(f"{count}Q")))
        number, offset = self.numbers("IQ")
        total = 1
        for side in shape:
            total *= side
        if not 1 <= total <= LARGEST_SIDE:
            raise self.wrong(f"tensor {name!r} has the shape {list(shape)}")
        if number not in BY_NUMBER:
            raise InputError(
                f"{self.path}: tensor {name!r} is of ggml's type number {number}; layerwise reads {', '.join(TYPES)}"
            )
        kind = BY_NUMBER[number]
        if shape[-1] % kind.columns:
            raise self.wrong(f"tensor {name!r} has {shape[-1]} columns, which blocks of {kind.columns} do not divide")
        return name, kind, shape, offset

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or depth > 1:
            raise self.wrong(f"a value has the unknown type {kind}")
        inner, count = self.numbers("IQ")
        if count > LARGEST_ARRAY:
            raise self.wrong(f"an array claims {count} entries")
        if inner in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[inner]}"))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if length > LARGEST_TEXT:
            raise self.wrong(f"a text claims {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("a text is not UTF-8") from None

    def numbers(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise InputError(f"{self.path} is truncated: its header goes on where the file ends")
        self.left -= count
        return self.stream.read(count)

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.path} is corrupted: {what}")
