"""Whether the kernels work here: what the processor has, the path that is taken, a self-test of every product."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.kernels.gpu import DEVICE, Gpu, TritonMatrix, gpus, triton_version
from layerwise.kernels.library import chosen_path, library, paths, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.samples import GPU_SAMPLES, SAMPLES, SPARSE_SAMPLES, reference

TOLERANCE = {"exact": 1e-5, "int8": 1e-2}  # of the reference's norm
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
READ_BYTES = 256 << 20
# No such machine was at hand: the bits were compared under an emulator (`make neon-test`), nothing was timed.
NOTES = dict.fromkeys(
    ("neon-dot", "neon"), "its results were compared under an emulator only, its speed was never measured"
)


@dataclass(frozen=True)
class Test:
    """One product against its reference: ``error`` is the relative distance, or NaN."""

    path: str
    form: str
    activations: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE[self.activations]


@dataclass(frozen=True)
class Machine:
    processor: str
    features: tuple[str, ...]  # of those that matter here
    threads: int
    pool: str  # whose threads the kernels use; empty without the library
    paths: tuple[str, ...]
    chosen: str | None
    absent: str  # why there is no library
    read: float | None  # bytes a second
    note: str = ""  # what to know about the chosen path
    gpus: tuple[Gpu, ...] = ()
    triton: str = ""  # its version; empty where it is not installed


def examine() -> Machine:
    """The processor, the paths and the memory bandwidth of reading, measured with torch's number of threads."""
    loaded = library()
    pool = "" if loaded is None else loaded.layerwise_threads().decode()
    chosen = chosen_path() if loaded is not None else None
    runs = paths()
    read = read_bandwidth(chosen or runs[0]) if runs else None
    return Machine(
        processor(), features(), torch.get_num_threads(), pool, runs, chosen, why_absent(), read,
        NOTES.get(chosen or "", ""), gpus(), triton_version(),
    )  # fmt: skip


def self_test() -> list[Test]:
    """Every form on every path that runs here, on a small odd shape, from float and from int8 activations."""
    found = []
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    for form, sample in SAMPLES.items():
        stored = sample.draw(37, 300)
        exact = x.double() @ reference(stored).double().T
        matrix = PackedMatrix(stored)
        for path in paths():
            for activations in ("exact",) if sample.levels else ("exact", "int8"):
                y = matrix.multiply(x, int8=activations == "int8", path=path)
                found.append(Test(path, form, activations, float((y - exact).norm() / exact.norm())))
    for form, kept in SPARSE_SAMPLES.items():
        exact = x.double() @ kept.draw(37, 300)[1].double().T
        sparse = kept.packed(37, 300)
        for path in paths():
            error = float((sparse.multiply(x, path=path) - exact).norm() / exact.norm())
            found.append(Test(path, form, "exact", error))
    return found


def gpu_self_test(device: str = DEVICE, forms: tuple[str, ...] = GPU_SAMPLES) -> list[Test]:
    """Every form of codes by Triton's kernels, from one token, which takes one kernel, and from many."""
    found = []
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    for form in forms:
        stored = SAMPLES[form].draw(37, 300)
        exact = x.double() @ reference(stored).double().T
        matrix = TritonMatrix(stored.to(device))
        for few, path in ((1, "triton, 1"), (40, "triton, 40")):
            y = matrix.multiply(x[:few].to(device)).cpu()
            found.append(Test(path, form, "exact", float((y - exact[:few]).norm() / exact[:few].norm())))
    return found


def read_bandwidth(path: str, rounds: int = 3) -> float:
    """Bytes a second that reading ``READ_BYTES`` reaches, the best of some rounds."""
    first = PackedMatrix(SAMPLES["int8"].draw(4096, 4096))
    copies = [first, *(first.copy() for _ in range(READ_BYTES // first.nbytes))]
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        for matrix in copies:
            matrix.read(path)
        best = max(best, sum(m.nbytes for m in copies) / (time.perf_counter() - began))
    return best


def processor() -> str:
    """The processor's name as the system gives it."""
    for line in _cpu_lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def features() -> tuple[str, ...]:
    """Those of ``FEATURES`` that the system reports, in that order."""
    for line in _cpu_lines():
        if line.startswith(("flags", "Features")):
            has = set(line.partition(":")[2].split())
            return tuple(name for name in FEATURES if name in has)
    return ()


def cache_bytes() -> int | None:
    """The last-level cache as the system reports it: shared ones of virtual machines are often misreported."""
    found = [_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((size for size in found if size is not None), default=None)


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _size(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip()
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[:-1].isdigit() and text[-1:] in units else None
