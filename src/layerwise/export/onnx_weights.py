"""Stored forms as nodes of ONNX: products that ONNX Runtime multiplies packed, rows of tables, and the rest decoded.

``MatMulNBits`` (2, 4 or 8 bits; blocks of 16 to 256 columns; zero points in the codes' type) computes with
``(code - zero) * step``, the very values of our integer, ternary and binary grids: a longer group repeats its step, a
code of 3 bits moves into 4, one of 5 to 7 into 8. Groups that it cannot have are decoded by plain operators in the
graph, from the same codes and steps, for an ordinary ``MatMul``. A look-up table keeps its 4-bit codes and takes its
levels by ``Gather``; a sum of forms is a sum of products; two low-rank factors are two products. Scales stay in the
file as they are stored: fp16, or bytes and a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerwise.encoding.binary import Binary
from layerwise.encoding.codebook import LEVELS, Codebook
from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import FittedGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.lowrank import LowRank
from layerwise.encoding.scales import Scales
from layerwise.encoding.sums import Sum
from layerwise.encoding.ternary import Ternary
from layerwise.export.onnx_graph import CONTRIB, Graph

BLOCKS = (256, 128, 64, 32, 16)
WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Blocks:
    """Codes of a matrix in blocks of columns, as names in a graph; weight = (code - zero) * step, or level * step.

    codes [rows, blocks, bytes] uint8, steps [rows, blocks] float32; zeros [rows, bytes] packed uint8 or None: the
    middle; or zeros [rows, blocks] float32 (``float_zeros``); levels [16] float32 or None. ``packed``: ``MatMulNBits``
    has such blocks.
    """

    rows: int
    columns: int
    bits: int
    block: int
    codes: str
    steps: str
    zeros: str | None = None
    levels: str | None = None
    packed: bool = True
    float_zeros: bool = False


class Weights:
    """Adds stored forms to a graph, each tensor once, however often it is used."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._blocks: dict[str, Blocks] = {}
        self._dense: dict[str, str] = {}

    def product(self, form: Encoded, x: str, name: str) -> str:
        """``x W^T``: [..., columns] -> [..., rows]."""
        graph = self.graph
        if isinstance(form, Sum):
            first = self.product(form.first, x, f"{name}.first")
            return graph.node("Add", first, self.product(form.second, x, f"{name}.second"))
        if isinstance(form, LowRank):
            inner = self.product(form.right, x, f"{name}.right")
            return graph.node("MatMul", inner, self.decoded(form.left, f"{name}.left"))
        if isinstance(form, Ternary) and form.planes > 1:
            parts = [self._times(self.blocks(form, name, plane), x) for plane in range(form.planes)]
            total = parts[0]
            for part in parts[1:]:
                total = graph.node("Add", total, part)
            return total
        if isinstance(form, Binary) and form.mean is not None:
            total = graph.node("ReduceSum", x, graph.ints(-1), keepdims=1)
            means = graph.node("Mul", total, self._means(form, name))
            return graph.node("Add", self._times(self.blocks(form, name), x), means)
        if isinstance(form, Dense):
            return graph.node("MatMul", x, graph.node("Transpose", self.decoded(form, name), perm=[1, 0]))
        return self._times(self.blocks(form, name), x)

    def rows(self, form: Encoded, index: str, name: str) -> str:
        """Rows at ``index`` [...] int64: [..., columns]."""
        graph = self.graph
        if isinstance(form, Sum):
            first = self.rows(form.first, index, f"{name}.first")
            return graph.node("Add", first, self.rows(form.second, index, f"{name}.second"))
        if isinstance(form, LowRank):
            left = graph.node("Transpose", self.decoded(form.left, f"{name}.left"), perm=[1, 0])
            return graph.node("MatMul", graph.node("Gather", left, index), self.decoded(form.right, f"{name}.right"))
        if isinstance(form, Dense):
            return self._float_rows(form.values, index, name)
        planes = form.planes if isinstance(form, Ternary) else 1
        parts = [self._decode(self.blocks(form, name, plane), index) for plane in range(planes)]
        total = parts[0]
        for part in parts[1:]:
            total = graph.node("Add", total, part)
        if isinstance(form, Binary) and form.mean is not None:
            means = graph.node("Gather", self._means(form, name), index)
            total = graph.node("Add", total, graph.node("Unsqueeze", means, graph.ints(-1)))
        return total

    def _means(self, form: Binary, name: str) -> str:
        key = f"{name}_mean"
        if key not in self._dense:
            assert form.mean is not None
            self._dense[key] = self.graph.floats(form.mean, key)
        return self._dense[key]

    def decoded(self, form: Encoded, name: str) -> str:
        """The whole matrix [rows, columns] float32, decoded in the graph."""
        if name not in self._dense:
            if isinstance(form, Dense):
                self._dense[name] = self.graph.floats(form.values, name)
            else:
                self._dense[name] = self._decode(self.blocks(form, name), None)
        return self._dense[name]

    def _float_rows(self, values: Tensor, index: str, name: str) -> str:
        """Rows are taken before they are widened, so that a table is never widened as a whole."""
        if name not in self._dense:
            self._dense[name] = self.graph.floats(values, name)
        rows = self.graph.node("Gather", name, index)
        return rows if values.dtype == torch.float32 else self.graph.cast(rows, "FLOAT")

    # ------------------------------------------------------------ blocks

    def blocks(self, form: Encoded, name: str, plane: int = 0) -> Blocks:
        """The blocks of a form, written to the data file the first time."""
        key = f"{name}.{plane}" if plane else name
        if key not in self._blocks:
            if isinstance(form, GroupedInteger):
                self._blocks[key] = self._integer(form, key)
            elif isinstance(form, Codebook):
                self._blocks[key] = self._table(form, key)
            elif isinstance(form, Ternary | Binary):
                self._blocks[key] = self._few_levels(form, plane, key)
            else:
                raise ValueError(f"{name}: the form {form.form} has no blocks; see supported()")
        return self._blocks[key]

    def _integer(self, form: GroupedInteger, name: str) -> Blocks:
        grid, columns = form.grid, form.shape[1]
        bits = next(width for width in WIDTHS if width >= grid.bits)
        width = grid.width(columns)
        codes, zeros = form.codes(), form.fitted.zero
        if zeros is None:
            codes = codes + (2 ** (bits - 1) - grid.middle)
        return self._store(name, codes, zeros, width, bits, self._steps(form.fitted, width, name), None)

    def _table(self, form: Codebook, name: str) -> Blocks:
        width = form.fitted.grid.width(form.shape[1])
        levels = self.graph.constant(torch.tensor(LEVELS[form.name]).numpy())
        return self._store(name, form.codes(), None, width, 4, self._steps(form.fitted, width, name), levels)

    def _few_levels(self, form: Ternary | Binary, plane: int, name: str) -> Blocks:
        """-1, 0 and 1, or -1 and 1, as the codes 1, 2 and 3 of two bits."""
        columns = form.columns
        width = columns if form.group == 0 else min(form.group, columns)
        groups = -(-columns // width)
        stored = form.scales.stored[:, plane * groups : (plane + 1) * groups]
        steps = self._scaled(Scales(stored, form.scales.factor), width, columns, name)
        codes = form.codes()[:, plane] + 1 if isinstance(form, Ternary) else 2 * form.codes() + 1
        return self._store(name, codes, None, width, 2, steps, None)

    def _store(
        self, name: str, codes: Tensor, zeros: Tensor | None, width: int, bits: int, steps: str, levels: str | None
    ) -> Blocks:
        rows, columns = codes.shape
        block, packed = block_of(width)
        count = -(-columns // block)
        spare = count * block - columns
        filled = torch.full((rows, spare), 2 ** (bits - 1), dtype=torch.uint8)
        whole = torch.cat([codes.to(torch.uint8), filled], 1).view(rows, count, block)
        stored = self.graph.tensor(packed_low_first(whole, bits), name)
        zero_name = None
        real = zeros is not None and zeros.is_floating_point()
        if zeros is not None and real:
            zero_name = self.graph.floats(_spread(zeros, width, block, columns), f"{name}_zero")
        elif zeros is not None:
            spread = _spread(zeros, width, block, columns)
            zero_name = self.graph.tensor(packed_low_first(spread, bits), f"{name}_zero")
        packed = packed and levels is None and not real
        return Blocks(rows, columns, bits, block, stored, steps, zero_name, levels, packed, real)

    def _steps(self, fitted: FittedGrid, width: int, name: str) -> str:
        if fitted.grid.scale_bits == 8 and not fitted.grid.float_scale:
            return self._scaled(Scales(fitted.scale, fitted.factor), width, fitted.columns, name)
        steps = fitted.steps()
        half = steps.half()
        stored = half if torch.equal(half.float(), steps) else steps
        return self.graph.floats(_spread(stored, width, block_of(width)[0], fitted.columns), f"{name}_scale")

    def _scaled(self, scales: Scales, width: int, columns: int, name: str) -> str:
        spread = _spread(scales.stored, width, block_of(width)[0], columns)
        if scales.factor is None:
            return self.graph.floats(spread, f"{name}_scale")
        codes = self.graph.cast(self.graph.tensor(spread, f"{name}_scale"), "FLOAT")
        factor = self.graph.floats(scales.factor[:, None], f"{name}_scale_factor")
        return self.graph.node("Mul", codes, factor)

    # ------------------------------------------------------------ nodes over blocks

    def _times(self, stored: Blocks, x: str) -> str:
        graph = self.graph
        if not stored.packed:
            key = f"{stored.codes} transposed"
            if key not in self._dense:
                self._dense[key] = graph.node("Transpose", self._decode(stored, None), perm=[1, 0])
            return graph.node("MatMul", x, self._dense[key])
        inputs = [x, stored.codes, stored.steps, *([stored.zeros] if stored.zeros else [])]
        return graph.node(
            "MatMulNBits", *inputs, domain=CONTRIB, K=stored.columns, N=stored.rows, bits=stored.bits,
            block_size=stored.block,
        )  # fmt: skip

    def _decode(self, stored: Blocks, index: str | None) -> str:
        """Some rows, or all, by plain operators: unpack, subtract the zero, times the step."""
        graph = self.graph

        def taken(name: str) -> str:
            return name if index is None else graph.node("Gather", name, index)

        count = -(-stored.columns // stored.block)
        codes = self._unpacked(taken(stored.codes), stored.bits, stored.block)  # [..., blocks, block] uint8
        steps = graph.node("Unsqueeze", taken(stored.steps), graph.ints(-1))
        if stored.levels is not None:
            values = graph.node("Gather", stored.levels, graph.cast(codes, "INT32"))
        else:
            values = graph.cast(codes, "FLOAT")
            if stored.zeros is None:
                zero = graph.number(2 ** (stored.bits - 1))
            elif stored.float_zeros:
                zero = graph.node("Unsqueeze", taken(stored.zeros), graph.ints(-1))
            else:
                zeros = graph.cast(self._unpacked(taken(stored.zeros), stored.bits, count), "FLOAT")
                zero = graph.node("Unsqueeze", zeros, graph.ints(-1))
            values = graph.node("Sub", values, zero)
        values = graph.node("Mul", values, steps)
        lead = [0] if index is None else [0, 0]  # rows are asked for by [batch, length]
        values = graph.node("Reshape", values, graph.ints(*lead, count * stored.block))
        return self._cut(values, stored.columns, count * stored.block)

    def _unpacked(self, packed: str, bits: int, count: int) -> str:
        """[..., bytes] uint8 -> [..., count] codes."""
        graph = self.graph
        per = 8 // bits
        if per == 1:
            return packed
        wide = graph.node("Unsqueeze", packed, graph.ints(-1))
        shifts = graph.constant(np.arange(per, dtype=np.uint8) * np.uint8(bits))
        codes = graph.node("BitShift", wide, shifts, direction="RIGHT")
        codes = graph.node("BitwiseAnd", codes, graph.constant(np.array(2**bits - 1, np.uint8)))
        shape = graph.node("Concat", graph.node("Shape", packed, end=-1), graph.ints(-1), axis=0)
        codes = graph.node("Reshape", codes, shape)
        return self._cut(codes, count, -(-count // per) * per)

    def _cut(self, value: str, wanted: int, have: int) -> str:
        if wanted == have:
            return value
        ints = self.graph.ints
        return self.graph.node("Slice", value, ints(0), ints(wanted), ints(-1))


def supported(form: Encoded) -> str | None:
    """None where a form has an exact equal here, else the end of a sentence that says why not."""
    if isinstance(form, Sum):
        return supported(form.first) or supported(form.second)
    if isinstance(form, LowRank):
        return supported(form.left) or supported(form.right)
    return (
        None
        if isinstance(form, Dense | GroupedInteger | Codebook | Ternary | Binary)
        else f"is of the form {form.form}"
    )


def block_of(width: int) -> tuple[int, bool]:
    """The block for groups of ``width`` columns, and whether ``MatMulNBits`` has it."""
    found = next((block for block in BLOCKS if width % block == 0), None)
    return (width, False) if found is None else (found, True)


def packed_low_first(codes: Tensor, bits: int) -> Tensor:
    """[..., n] uint8 codes -> [..., bytes], the first in the lowest bits; each last axis ends on a whole byte."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    places = padded.view(*codes.shape[:-1], -1, per)
    packed = places[..., 0].clone()
    for place in range(1, per):
        packed |= places[..., place] << (bits * place)
    return packed


def _spread(values: Tensor, width: int, block: int, columns: int) -> Tensor:
    """[rows, groups] -> [rows, blocks]: a group's value for each of its blocks."""
    starts = torch.arange(0, columns, block)
    return values[:, starts // width].contiguous()
