"""How fast the packed products are on a GPU, beside torch's dense products there.

As on the CPU (``measure.py``): a set of more than ``SET_BYTES`` of every form, so that weights come from memory and not
from a cache, timed in turn, round after round. A figure is the time of a whole set over its matrices, from the first
call to the device's last result: it holds what calling costs from Python, and below some 20 microseconds little else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.kernels.gpu import DEVICE, TritonMatrix
from layerwise.kernels.matrix import Canonical
from layerwise.kernels.samples import GPU_SAMPLES, SAMPLES, copies_of

SET_BYTES = 416_000_000  # caches of large GPUs hold a tenth of this
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class GpuRow:
    """One product, medians of all rounds, in microseconds.

    share: packed bytes over its time, over the bytes a second at which torch sums numbers of the same set.
    over_dense: torch's dense product of the same type over this one's time: above 1 is faster than dense.
    """

    form: str
    activations: str
    rows: int
    columns: int
    batch: int
    microseconds: float
    spread: float  # of the middle half of the rounds
    bytes: int
    share: float
    over_dense: float


def measure_gpu(
    shapes: tuple[tuple[int, int], ...],
    batches: tuple[int, ...],
    rounds: int = 5,
    forms: tuple[str, ...] = GPU_SAMPLES,
    types: tuple[str, ...] = ("fp16",),
    set_bytes: int = SET_BYTES,
    device: str = DEVICE,
    shown: Callable[[str], None] = lambda _: None,
) -> list[GpuRow]:
    """Time every form on every shape and batch on ``device``."""
    found = []
    for rows, columns in shapes:
        for form in forms:
            shown(f"{form}, {rows} x {columns}, {device}")
            found += _measure(form, rows, columns, batches, rounds, types, set_bytes, device)
    return found


def _measure(
    form: str, rows: int, columns: int, batches: tuple[int, ...], rounds: int, types: tuple[str, ...],
    set_bytes: int, device: str,
) -> list[GpuRow]:  # fmt: skip
    stored = SAMPLES[form].draw(rows, columns)
    kept = (stored.codes, stored.scale, stored.zero, stored.factor)
    packed_bytes = sum(t.numel() * t.element_size() for t in kept if t is not None)
    copies = copies_of(rows, columns, packed_bytes, set_bytes)
    packed = [TritonMatrix(_copy(stored, device)) for _ in range(copies)]
    numbers = [torch.ones(set_bytes // 4, device=device)]
    found = []
    for name in types:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device, TYPES[name])
        dense = [weight.clone() for _ in range(1 + set_bytes // (weight.numel() * weight.element_size()))]
        for batch in batches:
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(device, TYPES[name])
            times = _rounds(
                {
                    "packed": (packed, _product(x)),
                    "dense": (dense, _dense(x)),
                    "read": (numbers, lambda values: values.sum()),
                },
                rounds,
                device,
            )
            middle = {kind: statistics.median(taken) for kind, taken in times.items()}
            limit = numbers[0].numel() * 4 / middle["read"]
            ordered = sorted(times["packed"])
            spread = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
            found.append(
                GpuRow(
                    form, name, rows, columns, batch, middle["packed"] * 1e6, spread * 1e6, packed_bytes,
                    packed_bytes / middle["packed"] / limit, middle["dense"] / middle["packed"],
                )
            )  # fmt: skip
    return found


def _product(x: Tensor) -> Callable[[Any], object]:
    return lambda matrix: matrix.multiply(x)


def _dense(x: Tensor) -> Callable[[Any], object]:
    return lambda weight: torch.nn.functional.linear(x, weight)


def _copy(stored: Canonical, device: str) -> Canonical:
    """The matrix in memory of its own."""
    return replace(stored.to(device), codes=stored.codes.to(device, copy=True))


@torch.inference_mode()
def _rounds(
    runs: dict[str, tuple[list[Any], Callable[[Any], object]]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of one product of each kind in each round; the first round, which compiles, is left out."""
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(rounds + 1):
        for kind, (matrices, product) in runs.items():
            _wait(device)
            began = time.perf_counter()
            for matrix in matrices:
                product(matrix)
            _wait(device)
            times[kind] += [(time.perf_counter() - began) / len(matrices)] if turn else []
    return times


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
