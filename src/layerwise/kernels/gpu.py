"""Packed products on a GPU: whether there are any, and a stored matrix that multiplies through Triton's kernels.

Triton is an optional dependency (``pip install 'layerwise[gpu]'``) and is imported when the first packed matrix on a
GPU multiplies. Without it, and for forms that have no kernel, a chunk of rows at a time is decoded on the GPU and
multiplied by torch.

The kernels are right as far as Triton's interpreter tells, in which they are tested on the CPU, and compile for compute
capabilities 8.0 and 9.0. They have not run on a GPU: what a program takes at a time is chosen by what registers hold
and is no measurement.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from layerwise.kernels.library import OFF, VARIABLE
from layerwise.kernels.matrix import Canonical

DEVICE = "cuda"  # torch's name for the GPUs of both makers that Triton has a compiler for
FEW_TOKENS = 4  # up to here a product waits for the weights even when it multiplies without tensor cores
PROGRAMS = 512  # enough to keep a large GPU's multiprocessors busy with a few each
LARGEST_SPLIT = 16
LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """Tokens, rows and columns that one program multiplies at a time."""

    tokens: int
    rows: int
    columns: int


class TritonMatrix:
    """A stored matrix that multiplies where it lies: it points to the stored tensors and holds none of its own."""

    table = True  # no product with int8 activations: it multiplies them as they are

    def __init__(self, stored: Canonical) -> None:
        check(stored)
        self.rows, self.columns = stored.rows, stored.columns
        self._stored = stored
        self._codes = stored.codes.reshape(stored.rows, -1).contiguous()
        self._scale = stored.scale.contiguous()
        self._zero = None if stored.zero is None else stored.zero.contiguous()
        self._factor = None if stored.factor is None else stored.factor.contiguous()
        self._levels = None if stored.levels is None else stored.levels.to(self._codes.device)

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``: ``[..., columns]`` of float32, bfloat16 or float16 on the matrix's device, sums in float32.

        int8 activations are not rounded here (``table``); ``bias`` is float32 [rows] on the same device.
        """
        if x.device != self._codes.device or x.shape[-1:] != (self.columns,) or x.dtype not in TYPES:
            raise ValueError(
                f"activations are [..., {self.columns}] of float32, bfloat16 or float16 on {self._codes.device}, not "
                f"{list(x.shape)} of {x.dtype} on {x.device}"
            )
        flat = x.detach().reshape(-1, self.columns).contiguous()
        y = self._product(flat) if len(flat) else flat.new_empty(0, self.rows)
        y = y.view(*x.shape[:-1], self.rows)
        return y if bias is None else y.add_(bias)

    def _product(self, x: Tensor) -> Tensor:
        from layerwise.kernels.triton_products import few_tokens, many_tokens

        tokens, stored = len(x), self._stored
        few = tokens <= FEW_TOKENS
        tile = tile_of(tokens, x.dtype)
        across = (-(-self.rows // tile.rows),) if few else (-(-self.rows // tile.rows), -(-tokens // tile.tokens))
        split = split_of(across, -(-self.columns // tile.columns))
        y = torch.empty(split, tokens, self.rows, dtype=x.dtype if split == 1 else torch.float32, device=x.device)
        arguments = (
            x, self._codes, self._scale, self._factor, self._zero, self._levels, y,
            tokens, self.rows, self.columns, self._scale.shape[1] // stored.planes, stored.group,
            self._codes.shape[1], *(-(-self.columns * width // 8) for width in (4, 2, 1)),
        )  # fmt: skip
        constants = {
            "BITS": stored.bits, "TRITS": stored.trits, "PLANES": stored.planes, "CENTRE": stored.centre,
            "RUN": run_of(stored.group, stored.columns, tile.columns),
            "TOKENS": tile.tokens, "SPLIT": split, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns,
        }  # fmt: skip
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            if few:
                few_tokens[(*across, split)](*arguments, **constants)
            else:
                widened = interpreted() and x.dtype == torch.bfloat16
                many_tokens[(*across, split)](*arguments, **constants, WIDENED=widened)
        return y[0] if split == 1 else y.sum(0).to(x.dtype)


def tile_of(tokens: int, dtype: torch.dtype) -> Tile:
    """What a program multiplies at a time."""
    if tokens <= FEW_TOKENS:
        held = 1 << (tokens - 1).bit_length()
        return Tile(held, 8 if held < FEW_TOKENS else 4, 256)
    if dtype == torch.float32 or tokens <= 16:
        return Tile(16, 32, 64)
    return Tile(32 if tokens <= 32 else 64, 64, 64)


def split_of(across: tuple[int, ...], steps: int) -> int:
    """Parts that the columns are cut into, where tiles ``across`` rows and tokens are too few to fill a GPU."""
    programs = 1
    for count in across:
        programs *= count
    return max(1, min(PROGRAMS // programs, steps, LARGEST_SPLIT))


def run_of(group: int, columns: int, most: int) -> int:
    """Neighbouring columns, a power of two of them, that share a scale wherever a tile begins."""
    return most if group >= columns else min(most, group & -group)


def check(stored: Canonical) -> None:
    """Refuse tensors that do not fit their description: kernels read where it says."""
    if stored.trits:
        row = stored.planes * -(-stored.columns // 5)
    else:
        row = sum(-(-stored.columns * width // 8) for width in (8, 4, 2, 1) if stored.bits & width)
    scales = stored.planes * -(-stored.columns // stored.group)
    sound = stored.codes.dtype == torch.uint8 and stored.codes.numel() == stored.rows * row
    sound = sound and stored.scale.dtype in (torch.uint8, torch.float16) and 1 <= stored.bits <= 8
    sound = sound and stored.scale.shape == (stored.rows, scales)
    sound = sound and (stored.trits or stored.planes == 1) and stored.values is None
    sound = sound and (stored.zero is None or stored.zero.shape == stored.scale.shape)
    sound = sound and (stored.factor is None or stored.factor.shape == (stored.rows,))
    sound = sound and (stored.levels is None or (stored.levels.numel() == 16 and stored.bits == 4))
    if not sound:
        raise ValueError(f"a matrix of {stored.rows} x {stored.columns} codes that do not fit its description")


# ---------------------------------------------------------------- what there is


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted on the CPU here: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def why_decoded(device: torch.device) -> str:
    """Why products on this GPU decode and multiply by torch, as a clause; empty where Triton's kernels are taken."""
    if os.environ.get(VARIABLE, "") == OFF:
        return "they are turned off"
    return _why_no_triton() or _too_old(device)


def warn_decoded(why: str) -> None:
    """Say so once, for whoever waits for it."""
    _warn(f"torch decodes packed weights on the GPU at every product, since there are no kernels: {why}")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch reaches; ``decoded`` is what ``why_decoded`` says of it."""

    name: str
    decoded: str


def gpus() -> tuple[Gpu, ...]:
    found = [torch.device(DEVICE, index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(torch.cuda.get_device_name(device), why_decoded(device)) for device in found)


def triton_version() -> str:
    """Of the Triton that is installed; empty without one."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@cache
def _why_no_triton() -> str:
    try:
        import layerwise.kernels.triton_products  # noqa: F401
    except ImportError as missing:
        return f"triton cannot be imported ({missing}); install layerwise[gpu]"
    return ""


def _too_old(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    has = torch.cuda.get_device_capability(device)
    return "" if has >= LEAST_CAPABILITY else f"the GPU's compute capability is {has[0]}.{has[1]}, and they need 8.0"


@cache
def _warn(said: str) -> None:
    warnings.warn(said, RuntimeWarning, stacklevel=2)
