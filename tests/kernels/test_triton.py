"""Triton's products against the stored forms' own decoding: on a GPU where there is one, else by interpretation.

Where Triton is installed and there is no GPU, one test runs all others of this file in a process of its own with
TRITON_INTERPRET=1, in which Triton interprets the kernels on the CPU; and the kernels are compiled for two GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tests.kernels.test_products import KINDS, codebook, integer, normal, ternary

from layerwise.encoding import repacked
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.repacked import described, repack, triton_matrix
from layerwise.encoding.sums import Sum
from layerwise.errors import InputError
from layerwise.kernels import doctor, gpu
from layerwise.kernels.gpu import FEW_TOKENS, TritonMatrix, run_of, split_of, tile_of
from layerwise.kernels.gpu_measure import measure_gpu
from layerwise.network.packed import PackedLinear

INSTALLED = importlib.util.find_spec("triton") is not None
ON_GPU = INSTALLED and torch.cuda.is_available() and not gpu.interpreted()
DEVICE = gpu.DEVICE if ON_GPU else "cpu"
installed = pytest.mark.skipif(not INSTALLED, reason="triton is not installed: pip install 'layerwise[gpu]'")
runs = pytest.mark.skipif(
    not (ON_GPU or (INSTALLED and gpu.interpreted())),
    reason="no GPU here; where triton is installed, test_by_interpretation runs this on the CPU",
)
TOKENS = (1, 3, 5, 19, 70)
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the sum of the terms' sizes


def check(form: Encoded, tokens: tuple[int, ...] = (1, 7), dtype: torch.dtype = torch.float32) -> None:
    stored = described(form)
    assert stored is not None
    matrix, dense = TritonMatrix(stored.to(DEVICE)), form.decode().double()
    for count in tokens:
        x = normal(count, dense.shape[1], seed=count).to(dtype)
        y = matrix.multiply(x.to(DEVICE)).cpu()
        assert y.dtype == dtype and y.shape == (count, len(dense))
        terms = x.double().abs() @ dense.abs().T + 1e-30
        error = (y.double() - x.double() @ dense.T).abs() / terms
        assert float(error.max()) < CLOSE[dtype], (count, dtype)


@installed
@pytest.mark.skipif(ON_GPU or gpu.interpreted(), reason="the tests run themselves here")
def test_by_interpretation(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers(bits: int, kind: str):
    rows, columns, group = {2: (17, 172, 12), 3: (33, 301, 7)}.get(bits, (9, 90 + bits, 2 ** (bits - 1)))
    check(integer(rows, columns, bits, group, **KINDS[kind]))


@runs
@pytest.mark.parametrize("group", [1, 4, 5, 32, 96, 128, 0])
@pytest.mark.parametrize("columns", [1, 31, 300])
def test_groups(group: int, columns: int):
    check(integer(5, columns, 4, group), tokens=(2, 6))


@runs
@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ternary_planes(planes: int, scale_bits: int):
    check(ternary(18, 301, 128, planes, scale_bits))
    check(ternary(5, 7, 0, planes, scale_bits))


@runs
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codebooks(name: str):
    check(codebook(19, 100, name, 16))
    check(codebook(19, 100, name, 8))


@runs
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_tokens_and_types(dtype: torch.dtype):
    check(integer(70, 130, 4, 32), TOKENS, dtype)
    check(ternary(20, 130, 64, 1), (1, 20), dtype)


@runs
def test_the_same_bits_every_time_and_for_many_tokens():
    """Sums have one order: split or not, a token's product does not depend on how often it is computed."""
    form = integer(8, 2000, 3, 50)
    stored = described(form)
    assert stored is not None and split_of((1,), -(-2000 // tile_of(1, torch.float32).columns)) > 1
    matrix, x = TritonMatrix(stored.to(DEVICE)), normal(2, 2000).to(DEVICE)
    assert torch.equal(matrix.multiply(x), matrix.multiply(x))
    check(form, (1, 2, 9))


@runs
def test_odd_inputs():
    form = integer(20, 64, 4, 16)
    stored = described(form)
    assert stored is not None
    matrix, weight = TritonMatrix(stored.to(DEVICE)), form.decode().to(DEVICE)
    x = normal(6, 2, 64).to(DEVICE)
    turned = x.transpose(0, 1)  # not contiguous, more than two sides
    assert torch.allclose(matrix.multiply(turned), turned @ weight.T, atol=1e-4)
    assert matrix.multiply(x[:0]).shape == (0, 2, 20) and matrix.multiply(x[0, 0]).shape == (20,)
    bias = normal(20).to(DEVICE)
    assert torch.allclose(matrix.multiply(x, bias=bias), x @ weight.T + bias, atol=1e-4)
    for wrong in (x[..., :60], x.double()):
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            matrix.multiply(wrong)


@runs
@pytest.mark.parametrize("form", ["int3", "levels4", "ternary"])
def test_the_self_test_passes(form: str):
    tests = [test for test in doctor.gpu_self_test(DEVICE, (form,)) if test.form == form]
    assert len(tests) == 2 and all(test.passed for test in tests)


@runs
def test_packed_modules_take_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "DEVICE", DEVICE)  # under interpretation the CPU stands in for the GPU
    form = integer(24, 96, 4, 32)
    packed = PackedLinear(form.spec(), form.tensors(), torch.nn.Parameter(normal(24)), torch.float32).to(DEVICE)
    x = normal(3, 96).to(DEVICE)
    with torch.no_grad():
        expected = x @ form.decode().to(DEVICE).T + packed.bias
        assert torch.allclose(packed(x), expected, atol=1e-4)
        assert isinstance(packed.kernel(), TritonMatrix)
        packed.weight_scale.mul_(2)  # in place: what the kernel reads is the stored tensor itself
        assert torch.allclose(packed(x) - packed.bias, 2 * (expected - packed.bias), atol=1e-4)
    both = Sum(form, ternary(24, 96, 32, 1))
    if DEVICE == "cpu":
        kernel = repack(both)
        assert kernel is not None and torch.allclose(kernel.multiply(x), x @ both.decode().T, atol=1e-4)


@runs
def test_the_benchmark_makes_a_row_for_each():
    """What is timed under interpretation says nothing; that the rows are whole does."""
    rows = measure_gpu(((20, 64),), (1, 6), 2, ("int4", "ternary"), ("fp16", "fp32"), 1500, DEVICE)
    made = [(row.form, row.activations, row.batch) for row in rows]
    assert made == [(f, t, b) for f in ("int4", "ternary") for t in ("fp16", "fp32") for b in (1, 6)]
    assert all(row.microseconds > 0 and row.share > 0 and row.over_dense > 0 for row in rows)
    assert rows[0].bytes == 20 * 32 + 20 * 2 + 20  # codes, a step and a zero for each row
    with pytest.raises(InputError, match="too small"):
        measure_gpu(((1, 4),), (1,), set_bytes=1 << 20, device=DEVICE)


@runs
def test_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    assert triton_matrix(integer(4, 8, 4, 4)) is not None
    monkeypatch.setenv("LAYERWISE_KERNELS", "off")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gpu._warn.cache_clear()
        assert triton_matrix(integer(4, 8, 4, 4)) is None and triton_matrix(integer(4, 8, 2, 4)) is None
    assert len(said) == 1 and "decodes packed weights on the GPU" in str(said[0].message)


# ---------------------------------------------------------------- without running a kernel


def test_without_triton_forms_on_a_gpu_have_no_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "_why_no_triton", lambda: "it was taken away for a test")
    gpu._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="taken away for a test"):
        assert repacked.triton_matrix(integer(4, 8, 4, 4)) is None


def test_a_form_that_does_not_fit_is_refused():
    stored = described(integer(6, 40, 3, 8))
    assert stored is not None
    for change in ({"columns": 48}, {"rows": 7}, {"bits": 4}, {"group": 4}, {"planes": 2}):
        with pytest.raises(ValueError, match="do not fit"):
            TritonMatrix(type(stored)(**{**vars(stored), **change}))


def test_tiles():
    assert [tile_of(n, torch.float32).tokens for n in range(1, FEW_TOKENS + 1)] == [1, 2, 4, 4]
    assert all(tile_of(n, torch.bfloat16).tokens >= 16 for n in (5, 16, 17, 33, 4096))
    assert [run_of(g, 4096, 64) for g in (32, 96, 7, 128, 4096, 8192)] == [32, 32, 1, 64, 64, 64]
    assert split_of((1,), 3) == 3 and split_of((1000, 2), 50) == 1 and split_of((64,), 50) == 8


@installed
@pytest.mark.skipif(ON_GPU or gpu.interpreted(), reason="compiled when they run, or interpreted")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["few_tokens", "many_tokens"])
def test_the_kernels_compile(kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What interpretation cannot tell: that the kernels are Triton a compiler takes, with registers enough."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from layerwise.kernels import triton_products

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, tokens = getattr(triton_products, kernel), 1 if kernel == "few_tokens" else 64
    tile = tile_of(tokens, torch.bfloat16)
    pointers = {"x": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*u8", "y": "*bf16"}
    constants = {
        "factor": None, "levels": None, "BITS": 4, "TRITS": False, "PLANES": 1, "CENTRE": 8, "RUN": 32, "SPLIT": 1,
        "TOKENS": tile.tokens, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "WIDENED": False,
    }  # fmt: skip
    names = function.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    compiled = triton.compile(ASTSource(function, types, values), target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    tensor_cores = "mma" in compiled.asm["ptx"]
    assert tensor_cores == (kernel == "many_tokens")
