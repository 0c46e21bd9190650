"""A matrix of which some entries are kept, as the compiled kernels take it, and its product ``y = x W^T``.

    W[r, k] = v                              the kept entries as 16-bit floats, row after row, or
    W[r, k] = +- (f[r, g] + m) s[r, g]       as codes of a sign and a magnitude m, g the group of k;  0 elsewhere

Which entries are kept is a bit a column. Sixteen columns at a time, the next values of the row are spread to the lanes
of the set bits and multiplied by sixteen activations: only the mask and what is kept are read. Sums are float32 in a
fixed order, so that the bits are the same on every path and for any number of threads and tokens. Measured on a Zen 4
with half of 4096 x 4096 kept in fp16, from memory: one token at nine tenths of the bandwidth of reading, 2.2 times the
speed of the dense bfloat16 product and 4.3 times float32's; at 4 tokens the bfloat16 product is level, then ahead.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.kernels.library import SparseStored, chosen_path, library

LANES = 16  # columns at a time
SPARE = 64  # bytes behind the last value, which the last load of sixteen may read
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.uint8: 2}


@dataclass(frozen=True, eq=False)
class Kept:
    """A stored matrix: ``mask`` bool [rows, columns] and its kept ``values``, row after row, 16-bit floats or codes.

    With codes: ``bits`` of a code, the highest the sign; ``scale`` and ``floor`` float32 [rows, groups], each of
    ``group`` columns, a multiple of 16 or the whole row.
    """

    mask: Tensor
    values: Tensor
    bits: int = 1
    group: int = 0
    scale: Tensor | None = None
    floor: Tensor | None = None


class SparseMatrix:
    """``[rows, columns]`` for the kernels; holds the mask, a byte or two for every kept value, and the scales."""

    table = True  # no product with int8 activations

    def __init__(self, stored: Kept) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("there is no compiled library")
        self._library = loaded
        self.rows, self.columns = stored.mask.shape
        arrays = _arrays(stored)
        words = -(-self.columns // LANES)
        group_words = words if stored.scale is None or stored.group >= self.columns else stored.group // LANES
        groups = -(-words // group_words)
        _, _, _, scale, floor = arrays
        if scale is not None and (scale.shape != (self.rows, groups) or floor is None or floor.shape != scale.shape):
            raise ValueError("scales and floors are float32 [rows, groups], of groups of a multiple of 16 columns")
        kind = KINDS[stored.values.dtype]
        self._own(arrays, (self.rows, self.columns, words, kind, stored.bits, groups, group_words))

    def _own(self, arrays: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
        self._arrays, self._sizes = arrays, sizes
        self._described = SparseStored(*sizes, *(None if t is None else t.data_ptr() for t in arrays))
        self.nbytes = sum(t.numel() * t.element_size() for t in arrays if t is not None)

    def copy(self) -> SparseMatrix:
        """The same matrix in memory of its own."""
        twin = SparseMatrix.__new__(SparseMatrix)
        twin.rows, twin.columns, twin._library = self.rows, self.columns, self._library
        twin._own(tuple(None if t is None else t.clone() for t in self._arrays), self._sizes)
        return twin

    def read(self, path: str | None = None) -> None:
        """Only read the masks and the values, with as many threads: the limit that a product is held against."""
        name = path or chosen_path()
        for held in (self._arrays[0], self._arrays[2]):
            assert held is not None and name is not None
            self._library.layerwise_read_memory(held.data_ptr(), held.numel(), name.encode(), torch.get_num_threads())

    def multiply(self, x: Tensor, *, int8: bool = False, path: str | None = None, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``: ``[..., columns]`` of any float type on the CPU -> ``[..., rows]`` of the same type.

        bias: float32 ``[rows]``, contiguous; added before the result is rounded to ``x``'s type.
        """
        if x.device.type != "cpu" or x.shape[-1:] != (self.columns,):
            raise ValueError(f"activations are [..., {self.columns}] on the CPU, not {list(x.shape)} on {x.device}")
        if int8:
            raise ValueError("kept values have no product with int8 activations")
        path = path or chosen_path()
        if path is None:
            raise ValueError("the compiled kernels are turned off")
        given = x.detach().reshape(-1, self.columns).float()
        if given.stride(1) != 1 or (len(given) > 1 and given.stride(0) < self.columns):
            given = given.contiguous()
        y = torch.empty(len(given), self.rows)
        status = self._library.layerwise_sparse(
            ctypes.byref(self._described), ctypes.sizeof(self._described), path.encode(), given.data_ptr(), len(given),
            given.stride(0), y.data_ptr(), self.rows, None if bias is None else bias.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if status == 3:
            raise MemoryError("no memory for the activations of a sparse product")
        if status:
            raise ValueError(f"the compiled kernels have no path {path!r} here, or no such product")
        return y.to(x.dtype).view(*x.shape[:-1], self.rows)


def _arrays(stored: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Masks in words of 16 bits, where each row's values begin, the values with room behind them, and the scales."""
    rows, columns = stored.mask.shape
    if stored.mask.dtype != torch.bool or rows < 1 or columns < 1:
        raise ValueError("a mask is bool [rows, columns], with at least one of each")
    if stored.values.dtype not in KINDS or not 1 <= stored.bits <= 8:
        raise ValueError("kept values are float16, bfloat16 or codes of 1 to 8 bits in uint8")
    if (stored.values.dtype == torch.uint8) != (stored.scale is not None):
        raise ValueError("codes have scales and floors, and floats have none")
    if (stored.scale is None) != (stored.floor is None):
        raise ValueError("scales come with floors")
    if stored.scale is not None and stored.group < columns and (stored.group < 1 or stored.group % LANES):
        raise ValueError("a group is a multiple of 16 columns, or the whole row")
    bits = torch.zeros(rows, -(-columns // LANES) * LANES, dtype=torch.uint8)
    bits[:, :columns] = stored.mask
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    mask = (bits.view(rows, -1, 8) * weights).sum(2, dtype=torch.uint8)
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = stored.mask.sum(1).cumsum(0)
    if int(starts[-1]) != stored.values.numel():
        raise ValueError(f"a mask of {int(starts[-1])} entries with {stored.values.numel()} values")
    width = stored.values.element_size()
    values = torch.zeros(stored.values.numel() * width + SPARE, dtype=torch.uint8)
    values[: stored.values.numel() * width] = stored.values.contiguous().view(torch.uint8)
    scale, floor = (None if t is None else t.float().contiguous() for t in (stored.scale, stored.floor))
    return mask.contiguous(), starts, values, scale, floor
