"""Reading safetensors files that may be hostile, and writing them to the same bytes every time.

    ┌────────────┬──────────────────────────────┬──────────────────────────────┐
    │ 8 bytes: n │ n bytes of JSON, space-padded │ tensors, back to back        │
    └────────────┴──────────────────────────────┴──────────────────────────────┘

Everything in the header is checked before anything is allocated from it. Tensors are fetched with ``pread`` into plain
buffers, never mapped, so that resident memory is what was asked for. Offsets are relative to the end of the header.
Format: https://github.com/huggingface/safetensors (little-endian; so is every machine this runs on).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InputError

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> (dtype, shape)."""

LARGEST_HEADER = 100_000_000  # what safetensors itself allows
LARGEST_COUNT = 1 << 60  # of elements; torch computes strides in 64 bits
MOST_SIDES = 32
CHUNK_BYTES = 4 << 20  # read at once while converting

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``nbytes`` bytes from byte ``start`` of ``file``."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Elsewhere(TensorInfo):
    """A tensor of a file in another format, which knows how it is read; ``nbytes`` is what it takes up there."""

    def values(self, index: slice | Tensor) -> Tensor:
        """Some rows (of a vector: entries) in ``dtype``, at a range or a 1-D int64 index."""
        raise NotImplementedError


# ---------------------------------------------------------------- reading the header


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (by name, in file order) and metadata of a file. Raises ``InputError`` for anything malformed."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise InputError(f"{file} is truncated: it has {size} bytes, fewer than a safetensors header")
            if length > LARGEST_HEADER:
                raise InputError(
                    f"{file} is not a safetensors file: its header would be {length} bytes, at most "
                    f"{LARGEST_HEADER} are allowed"
                )
            if 8 + length > size:
                raise InputError(f"{file} is truncated: its header needs {8 + length} bytes, the file has {size}")
            text = stream.read(length)
    except OSError as reason:
        raise InputError(f"{file} cannot be read: {reason.strerror or reason}") from None
    entries = _parse(file, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{file} is corrupted: its __metadata__ must map text to text")
    tensors = [_check_entry(file, name, entry, 8 + length, size) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "leaves a gap before it"
            raise InputError(f"{file} is corrupted: tensor {tensor.name!r} {kind}")
        position += tensor.nbytes
    if position != size:
        raise InputError(f"{file} is corrupted: {size - position} bytes follow its last tensor")
    return {t.name: t for t in tensors}, metadata


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(f"{file} is corrupted: {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return found

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with an opening brace")
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
        for name in entries:
            name.encode("utf-8")  # a lone surrogate could not be printed or written again
    except InputError:
        raise
    except (ValueError, RecursionError) as reason:
        raise InputError(f"{file} is not a safetensors file: its header is not valid JSON ({reason})") from None
    return dict(entries)


def _check_entry(file: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    def wrong(what: str) -> InputError:
        return InputError(f"{file} is corrupted: tensor {name!r} {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly a dtype, a shape and data_offsets")
    written, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(written, str) or written not in DTYPES:
        raise wrong(f"has the unknown dtype {str(written)[:40]!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(side) for side in shape) or len(shape) > MOST_SIDES:
        raise wrong(f"has a shape that is not a list of at most {MOST_SIDES} non-negative whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise wrong("has data_offsets that are not two non-negative whole numbers")
    start, stop = offsets
    if stop < start:
        raise wrong(f"ends (at {stop}) before it begins (at {start})")
    if data + stop > size:
        raise InputError(
            f"{file} is truncated: tensor {name!r} needs {data + stop} bytes of the file, which has {size}"
        )
    dtype = DTYPES[written]
    if _product([max(side, 1) for side in shape]) > LARGEST_COUNT:
        raise wrong("is too large to exist")
    if _product(shape) * dtype.itemsize != stop - start:
        raise wrong(
            f"of shape {shape} and dtype {written} must have {_product(shape) * dtype.itemsize} bytes, "
            f"not {stop - start}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), data + start, stop - start)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _product(sides: Iterable[int]) -> int:
    count = 1
    for side in sides:
        count *= side
    return count


# ---------------------------------------------------------------- reading tensors


@contextlib.contextmanager
def _opened(info: TensorInfo) -> Iterator[int]:
    try:
        descriptor = os.open(info.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as reason:
        raise InputError(f"{info.file} cannot be read: {reason.strerror or reason}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(descriptor: int, info: TensorInfo, buffer: Tensor, start: int) -> None:
    """Fill a flat uint8 buffer from byte ``start`` of the file."""
    view = memoryview(buffer.numpy().data)
    while view:
        try:
            count = os.preadv(descriptor, [view], start)
        except OSError as reason:
            raise InputError(f"{info.file} cannot be read: {reason.strerror or reason}") from None
        if count == 0:
            raise InputError(f"{info.file} is truncated: tensor {info.name!r} ends before its last byte")
        view, start = view[count:], start + count


def _typed(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat uint8 buffer seen as ``dtype``; any non-zero byte is a true."""
    return buffer != 0 if dtype == torch.bool else buffer.view(dtype)


def read(info: TensorInfo, buffer: Tensor | None = None) -> Tensor:
    """The tensor as stored. With ``buffer`` (flat uint8, at least ``nbytes`` long) the result is a view of it."""
    if isinstance(info, Elsewhere):
        return info.values(slice(None)).view(info.shape)
    if buffer is None or info.nbytes == 0:
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    elif buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < info.nbytes:
        raise ValueError(f"the buffer for {info.name} must be flat uint8 of at least {info.nbytes} bytes")
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    part = buffer[: info.nbytes]
    with _opened(info) as descriptor:
        _fill(descriptor, info, part, info.start)
    return _typed(part, info.dtype).view(info.shape)


def chunks(info: TensorInfo) -> Iterator[Tensor]:
    """The tensor, flat, in pieces of a few megabytes. A piece is only valid until the next one is asked for."""
    if isinstance(info, Elsewhere):
        yield info.values(slice(None)).flatten()
        return
    step = CHUNK_BYTES // info.dtype.itemsize * info.dtype.itemsize
    buffer = torch.empty(min(step, info.nbytes), dtype=torch.uint8)
    with _opened(info) as descriptor:
        for start in range(0, info.nbytes, step):
            part = buffer[: min(step, info.nbytes - start)]
            _fill(descriptor, info, part, info.start + start)
            yield _typed(part, info.dtype)


def read_float(info: TensorInfo, out: Tensor | None = None) -> Tensor:
    """The tensor as float32, converted on the way: memory is the result plus a few megabytes."""
    if out is None:
        out = torch.empty(info.shape, dtype=torch.float32)
    if out.dtype != torch.float32 or tuple(out.shape) != info.shape or not out.is_contiguous():
        raise ValueError(f"the result for {info.name} must be contiguous float32 of shape {list(info.shape)}")
    if info.dtype == torch.float32 and info.nbytes and not isinstance(info, Elsewhere):
        with _opened(info) as descriptor:
            _fill(descriptor, info, out.view(-1).view(torch.uint8), info.start)
        return out
    flat, position = out.view(-1), 0
    for part in chunks(info):
        flat[position : position + part.numel()].copy_(part)
        position += part.numel()
    return out


def read_rows(info: TensorInfo, index: Tensor) -> Tensor:
    """Rows of a 2-D tensor at a 1-D integer ``index``, as stored: ``[len(index), columns]``.

    Only these rows are read; consecutive ones together.
    """
    if len(info.shape) != 2 or index.dim() != 1:
        raise ValueError(f"rows are read from a matrix at a 1-D index, not from {info.name} {list(info.shape)}")
    rows, columns = info.shape
    distinct, position = index.to("cpu", torch.int64).unique(return_inverse=True)
    if len(distinct) and (int(distinct[0]) < 0 or int(distinct[-1]) >= rows):
        raise IndexError(f"rows of {info.name} are 0 to {rows - 1}, not {int(distinct[0])} to {int(distinct[-1])}")
    if isinstance(info, Elsewhere):
        return info.values(distinct)[position]
    width = columns * info.dtype.itemsize
    buffer = torch.empty(len(distinct) * width, dtype=torch.uint8)
    # A run of consecutive rows ends where the next wanted row is not the next row of the file.
    ends = (torch.nonzero(distinct[1:] - distinct[:-1] != 1).flatten() + 1).tolist() + [len(distinct)]
    with _opened(info) as descriptor:
        first = 0
        for end in ends:
            if end > first:
                place = info.start + int(distinct[first]) * width
                _fill(descriptor, info, buffer[first * width : end * width], place)
            first = end
    return _typed(buffer, info.dtype).view(len(distinct), columns)[position]


# ---------------------------------------------------------------- writing


def write_order(layout: Layout) -> list[str]:
    """Names in file order: wide types first so that every tensor is aligned, then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def header_bytes(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """All bytes before the first tensor: the length and the JSON header, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name in write_order(layout):
        dtype, shape = layout[name]
        stop = position + _product(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = _compact(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def file_size(layout: Layout, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that ``write`` makes of this layout."""
    data = sum(_product(shape) * dtype.itemsize for dtype, shape in layout.values())
    return len(header_bytes(layout, metadata)) + data


def header_share(name: str, dtype: torch.dtype, shape: tuple[int, ...], below: int = 10**13) -> int:
    """Header bytes that one tensor adds, at most, in a file of fewer than ``below`` bytes.

    ``header_fixed(metadata)`` plus the shares of all tensors is never less than the real header.
    """
    widest = below - 1  # no offset has more digits than this
    entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [widest, widest]}
    return len(_compact({name: entry})) - 2 + 1  # without the braces, with a comma


def header_fixed(metadata: Mapping[str, str] | None = None) -> int:
    """Header bytes that do not depend on the tensors: length, braces, metadata and padding, at most."""
    return 8 + (len(_compact({"__metadata__": dict(metadata)})) + 1 if metadata else 2) + 7


Produced = Iterable[tuple[str, Tensor]] | Callable[[str], Tensor]


def write(path: Path, layout: Layout, produce: Produced, metadata: Mapping[str, str] | None = None) -> int:
    """Write a file of exactly this layout and return its size in bytes.

    ``produce`` gives the tensors one at a time, in any order, or is asked for them by name in file order. The file
    appears under its name only when it is complete and on disk.
    """
    header = header_bytes(layout, metadata)
    places: dict[str, int] = {}
    position = len(header)
    for name in write_order(layout):
        places[name] = position
        position += _product(layout[name][1]) * layout[name][0].itemsize
    produced = ((name, produce(name)) for name in write_order(layout)) if callable(produce) else produce
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(header)
            for name, tensor in produced:
                _check_produced(name, tensor, layout, places)
                stream.seek(places.pop(name))
                if tensor.numel():
                    stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            if places:
                raise ValueError(f"nothing was produced for {', '.join(sorted(places)[:3])}")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return position


def _check_produced(name: str, tensor: Tensor, layout: Layout, places: Mapping[str, int]) -> None:
    if name not in places:
        raise ValueError(f"{name} was {'produced twice' if name in layout else 'not announced in the layout'}")
    dtype, shape = layout[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} was announced as {dtype} {list(shape)} and produced as {tensor.dtype} {list(tensor.shape)}"
        )


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
