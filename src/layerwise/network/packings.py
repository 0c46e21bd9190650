"""How other tools pack grouped integers, read into ours code by code: GPTQ, AWQ and compressed-tensors.

==================  ==========================================  ================================================
method              a linear ``[out, in]`` is stored as         reads as
==================  ==========================================  ================================================
gptq                qweight int32 [in * b / 32, out]            codes, words along the inputs
                    qzeros  int32 [groups, out * b / 32]        zeros; minus one in the format ``gptq``, not in
                                                                ``gptq_v2``
                    scales [groups, out], g_idx int32 [in]      steps; the group of each input
awq (gemm)          qweight int32 [in, out / 8]                 4-bit codes along the outputs, eight in the order
                    qzeros  int32 [groups, out / 8]             0 2 4 6 1 3 5 7
                    scales [groups, out]
compressed-tensors  weight_packed int32 [out, in * b / 32]      codes, words along the inputs
(pack-quantized)    weight_zero_point int32 [out * b / 32, g]   zeros, words along the outputs; absent: symmetric
                    weight_scale [out, groups]                  steps
                    weight_shape int64 [2]                      out, in
==================  ==========================================  ================================================

All of them stand for ``step * (code - zero)``, which is our own grid: nothing is rounded. What is not is refused by
name: inputs in an order of their own (act-order), steps that fp16 cannot hold, zeros about which readers disagree.
The tensors come from files that may be hostile, so shapes are checked before anything is unpacked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.grid import FittedGrid, Grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.words import loose_count, unpack_loose, unpack_words, word_count
from layerwise.errors import InputError
from layerwise.network.safetensors_file import TensorInfo

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each four bits of a word, low bits first
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Place:
    """What headers say of a packed linear."""

    grid: Grid
    rows: int
    columns: int


class Packing(ABC):
    """One method's tensors, by the last part of their names."""

    marks: ClassVar[str]  # a module with this tensor is packed
    parts: ClassVar[tuple[str, ...]]  # every tensor that may belong to it

    @abstractmethod
    def place(self, site: str, infos: Infos, shape: Tensor | None) -> Place:
        """Grid and shape, from headers (and ``weight_shape`` where there is one); ``InputError`` for a misfit."""

    @abstractmethod
    def unpacked(self, site: str, tensors: Mapping[str, Tensor], place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes uint8 [rows, columns], scales [rows, groups], zeros uint8 [rows, groups] or None)."""

    def encoded(self, site: str, tensors: Mapping[str, Tensor], place: Place) -> GroupedInteger:
        """The linear as our own form, code by code."""
        index = tensors.get("g_idx", tensors.get("weight_g_idx"))
        if index is not None:
            check_order(site, index, place)
        codes, scales, zeros = self.unpacked(site, tensors, place)
        if place.grid.symmetric:
            if zeros is not None and bool((zeros != place.grid.middle).any()):
                raise InputError(f"{site} is said to be symmetric, but has zeros other than {place.grid.middle}")
            zeros = None
        fitted = FittedGrid(place.grid, place.columns, exact_steps(site, scales), None, zeros)
        return GroupedInteger.from_codes(codes, fitted)


@dataclass(frozen=True)
class Gptq(Packing):
    """``shifted``: zeros are stored minus one."""

    bits: int
    group: int
    symmetric: bool
    shifted: bool
    marks: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def place(self, site: str, infos: Infos, shape: Tensor | None) -> Place:
        words, rows = sides(site, infos, "qweight", torch.int32)
        if words * 32 % self.bits:
            raise InputError(f"{site}.qweight has {words} rows of words, which no {self.bits}-bit codes fill")
        columns = words * 32 // self.bits
        found = Place(Grid(self.bits, self.group, self.symmetric), rows, columns)
        groups = found.grid.groups(columns)
        expect(site, infos, "scales", (groups, rows))
        expect(site, infos, "qzeros", (groups, word_count(rows, self.bits)), torch.int32)
        return found

    def unpacked(self, site: str, tensors: Mapping[str, Tensor], place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
        codes = unpack_words(tensors["qweight"].T.contiguous(), place.columns, self.bits)
        zeros = unpack_words(tensors["qzeros"], place.rows, self.bits)
        if self.shifted:
            if bool((zeros == place.grid.top).any()):
                raise InputError(
                    f"{site}.qzeros holds {place.grid.top}, which some readers of the format gptq take for "
                    f"{place.grid.top + 1} and some for 0; store the checkpoint as gptq_v2"
                )
            zeros = zeros + 1
        return codes, tensors["scales"].T.contiguous(), zeros.T.contiguous()


@dataclass(frozen=True)
class Awq(Packing):
    group: int
    marks: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def place(self, site: str, infos: Infos, shape: Tensor | None) -> Place:
        columns, words = sides(site, infos, "qweight", torch.int32)
        found = Place(Grid(4, self.group), words * 8, columns)
        groups = found.grid.groups(columns)
        expect(site, infos, "qzeros", (groups, words), torch.int32)
        expect(site, infos, "scales", (groups, found.rows))
        return found

    def unpacked(self, site: str, tensors: Mapping[str, Tensor], place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
        codes, zeros = (
            in_order(unpack_words(tensors[name], place.rows, 4)).T.contiguous() for name in ("qweight", "qzeros")
        )
        return codes, tensors["scales"].T.contiguous(), zeros


@dataclass(frozen=True)
class CompressedTensors(Packing):
    """``formats``: the (bits, group, symmetric) that the config's groups name; a group of 0 is the whole row."""

    formats: frozenset[tuple[int, int, bool]] = field(default_factory=frozenset)
    marks: ClassVar[str] = "weight_packed"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip

    def place(self, site: str, infos: Infos, shape: Tensor | None) -> Place:
        rows, words = sides(site, infos, "weight_packed", torch.int32)
        if shape is None or shape.shape != (2,) or int(shape[0]) != rows:
            raise InputError(f"{site}.weight_shape must be two numbers, the first {rows}")
        columns, symmetric = int(shape[1]), "weight_zero_point" not in infos
        _, groups = sides(site, infos, "weight_scale")
        for bits, group, plain in sorted(self.formats):
            if (
                columns < 1
                or plain != symmetric
                or words not in (word_count(columns, bits), loose_count(columns, bits))
            ):
                continue
            grid = Grid(bits, group, symmetric)
            if grid.groups(columns) == groups and not (group and columns % grid.width(columns)):
                expect(site, infos, "weight_scale", (rows, groups))
                if not symmetric:
                    expect(site, infos, "weight_zero_point", (word_count(rows, bits), groups), torch.int32)
                return Place(grid, rows, columns)
        raise InputError(f"{site} has tensors of no format that the config names; its files are not of one run")

    def unpacked(self, site: str, tensors: Mapping[str, Tensor], place: Place) -> tuple[Tensor, Tensor, Tensor | None]:
        packed, bits = tensors["weight_packed"], place.grid.bits
        dense = packed.shape[1] == word_count(place.columns, bits)
        codes = (unpack_words if dense else unpack_loose)(packed, place.columns, bits)
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            zeros = unpack_words(zeros.T.contiguous(), place.rows, bits).T.contiguous()
        return codes, tensors["weight_scale"], zeros


# ---------------------------------------------------------------- configs


def packing_of(settings: Mapping[str, Any]) -> Packing:
    """The packing that a ``quantization_config`` describes; ``InputError`` for one that we do not read."""
    method = settings.get("quant_method")
    if method == "gptq":
        return _gptq(settings)
    if method == "awq":
        return _awq(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    raise InputError(
        f"the network is quantized already, by the method {str(method)[:40]!r}; layerwise keeps gptq, awq and "
        f"compressed-tensors encodings, and starts from the dense checkpoint otherwise"
    )


METHODS = ("gptq", "awq", "compressed-tensors")


def _gptq(settings: Mapping[str, Any]) -> Gptq:
    bits = settings.get("bits")
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise InputError(f"a gptq checkpoint has 2, 3, 4 or 8 bits, not {bits!r}")
    if settings.get("dynamic"):
        raise InputError("a gptq checkpoint with dynamic settings per module is not read; start from the dense one")
    form = settings.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise InputError(f"a gptq checkpoint in the format {str(form)[:40]!r} is not read; convert it to gptq_v2")
    symmetric = settings.get("sym", True)
    if not isinstance(symmetric, bool):
        raise InputError(f"sym of a gptq checkpoint is true or false, not {symmetric!r}")
    return Gptq(bits, _group(settings.get("group_size", 128)), symmetric, form == "gptq")


def _awq(settings: Mapping[str, Any]) -> Awq:
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or settings.get("zero_point", True) is not True:
        raise InputError(
            f"an awq checkpoint is read with 4 bits, zeros and the version gemm, not with {bits!r} bits and the "
            f"version {version[:40]!r}"
        )
    return Awq(_group(settings.get("group_size", settings.get("q_group_size", 128))))


def _compressed_tensors(settings: Mapping[str, Any]) -> CompressedTensors:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if settings.get(key):
            raise InputError(f"a compressed-tensors checkpoint with a {key} is not read; start from the dense one")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise InputError("the quantization_config of a compressed-tensors checkpoint has no config_groups")
    formats = set()
    for name, group in groups.items():
        form = group.get("format") or settings.get("format")
        weights = group.get("weights")
        if form != "pack-quantized" or group.get("input_activations") or group.get("output_activations"):
            raise InputError(
                f"config group {str(name)[:40]!r} is not weights in the format pack-quantized alone, which is what "
                f"layerwise reads of compressed-tensors; start from the dense checkpoint"
            )
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
            raise InputError(f"config group {str(name)[:40]!r} does not describe integer weights")
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if type(bits) is not int or not 2 <= bits <= 8 or not isinstance(symmetric, bool):
            raise InputError(f"config group {str(name)[:40]!r} must have 2 to 8 num_bits and symmetric true or false")
        formats.add((bits, _group(weights.get("group_size") or -1), symmetric))
    return CompressedTensors(frozenset(formats))


def _group(value: object) -> int:
    if type(value) is not int or not (value == -1 or 1 <= value <= 1 << 20):
        raise InputError(f"group_size is a positive number of columns or -1 for the whole row, not {value!r}")
    return 0 if value == -1 else value


# ---------------------------------------------------------------- tensors


def sides(site: str, infos: Infos, part: str, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """The two sides of a tensor, which must be there and hold something."""
    info = infos.get(part)
    if info is None or len(info.shape) != 2 or min(info.shape) < 1 or (dtype is not None and info.dtype != dtype):
        what = "a matrix" if dtype is None else f"an {str(dtype).removeprefix('torch.')} matrix"
        raise InputError(f"{site} is packed, but {site}.{part} is not {what}")
    return info.shape[0], info.shape[1]


def expect(site: str, infos: Infos, part: str, shape: tuple[int, int], dtype: torch.dtype | None = None) -> None:
    """``InputError`` unless a tensor has this shape, and this type or any float type."""
    found = sides(site, infos, part, dtype)
    if found != shape:
        raise InputError(f"{site}.{part} has the shape {list(found)}, but {list(shape)} goes with its codes")
    if dtype is None and infos[part].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"{site}.{part} must hold float16, bfloat16 or float32")


def check_order(site: str, index: Tensor, place: Place) -> None:
    """Refuse groups that are not runs of consecutive inputs: no form of ours has such groups."""
    wanted = torch.arange(place.columns) // place.grid.width(place.columns)
    if index.shape != wanted.shape or not torch.equal(index.long(), wanted):
        raise InputError(
            f"{site} groups its inputs in an order of its own (act-order, desc_act), which layerwise has no form for; "
            f"start from the dense checkpoint"
        )


def exact_steps(site: str, scales: Tensor) -> Tensor:
    """Steps as fp16, of the same value; ``InputError`` where fp16 has none of it."""
    half = scales.half()
    if not bool((torch.isfinite(half) & (half > 0)).all()) or not torch.equal(half.to(torch.float32), scales.float()):
        raise InputError(f"{site} has steps that are not positive numbers of fp16; start from the dense checkpoint")
    return half.contiguous()


def in_order(codes: Tensor) -> Tensor:
    """AWQ's codes [.., 8 n] as they lie in their words -> in the order of the outputs."""
    place = torch.argsort(torch.tensor(AWQ_ORDER))
    return codes.view(codes.shape[0], -1, 8)[:, :, place].reshape(codes.shape[0], -1)
