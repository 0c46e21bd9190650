"""How fast the packed products are, against what memory allows and against torch's dense products.

For each shape a set of more than ``SET_BYTES`` of every form is made, so that weights come from memory and not from a
cache, and all of them are timed in turn, round after round: what else the machine does meets all alike. A row's share
is packed bytes over median time, over the bandwidth of only reading the same bytes with the same threads in the same
rounds. Its share of dot products is of those that a loop does that has nothing else to do, again in the same rounds;
activations in float32 (exact) take three for every product, those in bfloat16 two. Other engines that are installed
(``peers.py``) are timed in the rounds of one form, that of int4 where it is among them. Figures are of one machine at
one time; nothing here judges them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.kernels.doctor import cache_bytes, processor
from layerwise.kernels.library import chosen_path, library, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.peers import PEERS, Engine, Product, prepared, versions
from layerwise.kernels.samples import SAMPLES, SPARSE_SAMPLES, Sample, SparseSample, copies_of
from layerwise.kernels.sparse import SparseMatrix

SET_BYTES = 208_000_000
SHAPES = ((4096, 4096), (11008, 4096))
BATCHES = (1, 8, 32)
LARGEST_SIDE = 1 << 16
FORMS: dict[str, Sample | SparseSample] = {**SAMPLES, **SPARSE_SAMPLES}
Matrix = PackedMatrix | SparseMatrix
DIGITS = {"exact": 3, "bf16": 2, "int8": 1}  # dot products for one of activations: float32 ones, bfloat16 ones, rounded
DOT_ROUNDS = 100_000  # of the loop of dot products: about a millisecond


@dataclass(frozen=True)
class Row:
    """One product, medians of all rounds. Ratios are dense time over this one's: above 1 is faster than dense."""

    form: str
    activations: str
    rows: int
    columns: int
    batch: int
    microseconds: float
    spread: float  # of the middle half of the rounds, in microseconds
    bytes: int
    share: float
    over_fp32: float
    over_bf16: float
    of_dots: float = 0.0  # dot products over those of the same time at the most; 0 for forms that have none


@dataclass(frozen=True)
class PeerRow:
    """Another engine's product; ``absent`` says why there are no figures."""

    name: str
    activations: str
    bits: int
    rows: int
    columns: int
    batch: int
    microseconds: float | None
    spread: float | None
    absent: str = ""
    beside: str = "int4"
    """The form in whose rounds it was timed."""


@dataclass(frozen=True)
class Report:
    processor: str
    path: str
    threads: int
    set_bytes: int
    cache_bytes: int | None
    torch: str
    rows: tuple[Row, ...]
    peers: tuple[PeerRow, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def over_peers(self, row: Row) -> dict[str, float]:
        """Each peer's median over this row's, where both were timed in the same rounds: above 1, this one is faster."""
        same = (row.form, row.rows, row.columns, row.batch)
        alike = [p for p in self.peers if p.microseconds and (p.beside, p.rows, p.columns, p.batch) == same]
        return {peer.name: (peer.microseconds or 0.0) / row.microseconds for peer in alike}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    batches: tuple[int, ...] = BATCHES,
    rounds: int = 5,
    forms: tuple[str, ...] = tuple(FORMS),
    set_bytes: int = SET_BYTES,
    shown: Callable[[str], None] = lambda _: None,
    peers: bool = True,
) -> Report:
    """Time every form on every shape and batch. Raises ``InputError`` for settings that mean nothing, or no kernels."""
    path = chosen_path()
    if path is None:
        raise InputError(f"there is nothing to measure: {why_absent() or 'the kernels are turned off'}")
    if rounds < 1 or any(not 1 <= batch <= 4096 for batch in batches):
        raise InputError("a benchmark has at least one round and batches of 1 to 4096 tokens")
    if any(not 1 <= side <= LARGEST_SIDE for shape in shapes for side in shape):
        raise InputError(f"the sides of a shape are 1 to {LARGEST_SIDE}")
    rows: list[Row] = []
    others: list[PeerRow] = []
    # All of them beside the form that most are made for; those of 8 bits beside our own 8 bits as well.
    beside = {"int8": 8, "int4" if "int4" in forms else forms[0]: None} if peers else {}
    for shape in shapes:
        for form in forms:
            shown(f"{form}, {shape[0]} x {shape[1]}")
            engines = _engines(*shape, set_bytes, beside[form]) if form in beside else []
            found, met = _measure(form, *shape, batches, rounds, set_bytes, engines)
            rows += found
            others += met
    return Report(
        processor(), path, torch.get_num_threads(), set_bytes, cache_bytes(), str(torch.__version__), tuple(rows),
        tuple(others), versions() if peers else {},
    )  # fmt: skip


def _measure(
    form: str,
    rows: int,
    columns: int,
    batches: tuple[int, ...],
    rounds: int,
    set_bytes: int,
    engines: list[Engine],
) -> tuple[list[Row], list[PeerRow]]:
    sample = FORMS[form]
    first: Matrix = sample.packed(rows, columns)
    packed = [first, *(first.copy() for _ in range(copies_of(rows, columns, first.nbytes, set_bytes) - 1))]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    dense = [weight.clone() for _ in range(-(-set_bytes // (4 * weight.numel())))]
    halved = [weight.bfloat16() for _ in range(-(-set_bytes // (2 * weight.numel())))]
    found, met = [], []
    dots = [0]
    for batch in batches:
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
        runs = _products(packed, dense, halved, x)
        runs["dots"] = list(range(5)), lambda _: dots.__setitem__(0, _dots())
        if not sample.whole:
            del runs["int8"]
        for peer, copies, product, _ in engines:
            if product is not None:
                runs[peer.name] = list(range(copies)), _of_peer(product, x)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, (each, run) in runs.items():
                taken = _times(each, run)
                times[name] += taken if turn else []  # the first round meets page faults
        middle = {name: statistics.median(taken) for name, taken in times.items()}
        most = dots[0] / middle["dots"]
        for activations, digits in ((name, digits) for name, digits in DIGITS.items() if name in times):
            median, spread = middle[activations], _spread(times[activations])
            ratios = (middle["read"] / median, middle["dense fp32"] / median, middle["dense bf16"] / median)
            size = (rows, columns, batch, median * 1e6, spread * 1e6, first.nbytes)
            done = 0.0 if not sample.whole else rows * columns * batch * digits / median
            found.append(Row(form, activations, *size, *ratios, done / most))
        for peer, _, _, absent in engines:
            own = times.get(peer.name)
            median_us = None if own is None else statistics.median(own) * 1e6
            spread_us = None if own is None else _spread(own) * 1e6
            met.append(
                PeerRow(
                    peer.name, peer.activations, peer.bits, rows, columns, batch, median_us, spread_us, absent, form
                )
            )
    return found, met


def _engines(rows: int, columns: int, set_bytes: int, bits: int | None) -> list[Engine]:
    """The peers of so many bits, or all."""
    return list(prepared(rows, columns, set_bytes, [p for p in PEERS if bits in (None, p.bits)]))


def _dots() -> int:
    loaded, path = library(), chosen_path()
    assert loaded is not None and path is not None
    return int(loaded.layerwise_dots(path.encode(), DOT_ROUNDS, torch.get_num_threads()))


def _of_peer(product: Product, x: Tensor) -> Callable[[int], object]:
    return lambda copy: product(copy, x)


def _products(
    packed: list[Matrix], dense: list[Tensor], halved: list[Tensor], x: Tensor
) -> dict[str, tuple[list[Any], Callable[[Any], object]]]:
    """What is timed: name -> (the matrices, the product of one of them)."""
    linear, small = torch.nn.functional.linear, x.bfloat16()
    return {
        "read": (packed, lambda matrix: matrix.read()),
        "exact": (packed, lambda matrix: matrix.multiply(x)),
        "bf16": (packed, lambda matrix: matrix.multiply(small)),
        "int8": (packed, lambda matrix: matrix.multiply(x, int8=True)),
        "dense fp32": (dense, lambda weight: linear(x, weight)),
        "dense bf16": (halved, lambda weight: linear(small, weight)),
    }


@torch.inference_mode()
def _times(copies: list[Any], product: Callable[[Any], object]) -> list[float]:
    taken = []
    for weight in copies:
        began = time.perf_counter()
        product(weight)
        taken.append(time.perf_counter() - began)
    return taken


def _spread(times: list[float]) -> float:
    ordered = sorted(times)
    return ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
