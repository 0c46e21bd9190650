"""The compiled products against the stored forms' own decoding: every width, zero, scale, path, odd shape and edge."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layerwise.encoding.codebook import LEVELS, Codebook, fit_codebook, nearest_levels
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.repacked import packed_matrix
from layerwise.encoding.scales import Scales, groups_of
from layerwise.encoding.ternary import Ternary
from layerwise.kernels.library import library, paths, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.samples import SAMPLES, reference

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

KINDS = {
    "whole zeros": {},
    "symmetric": {"symmetric": True},
    "float zeros": {"float_zero": True},
    "8-bit scales": {"scale_bits": 8},
    "8-bit float scales": {"scale_bits": 8, "float_scale": True, "symmetric": True},
}
SHAPES = ((1, 4), (15, 30), (17, 172), (48, 300))  # rows, columns: less than a tile, odd, a short last group


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integer(rows: int, columns: int, bits: int, group: int, **kind: bool | int) -> GroupedInteger:
    weight = normal(rows, columns)
    fitted = fit_grid(weight, Grid(bits, group, **kind))  # type: ignore[arg-type]
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


def ternary(rows: int, columns: int, group: int, planes: int, scale_bits: int = 16) -> Ternary:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 3, (rows, planes, columns), dtype=torch.uint8, generator=g)
    wanted = torch.rand(rows, planes * groups_of(group, columns), generator=g) + 0.1
    return Ternary.from_codes(codes, group, Scales.of(wanted, scale_bits))


def codebook(rows: int, columns: int, name: str, scale_bits: int) -> Codebook:
    weight = normal(rows, columns)
    fitted = fit_codebook(weight, name, 32, scale_bits)
    return Codebook.from_codes(nearest_levels(weight, name, fitted), name, fitted)


def packed(form: Encoded) -> PackedMatrix:
    found = packed_matrix(form)
    assert found is not None
    return found


def check(form: Encoded, tokens: tuple[int, ...] = (1, 2, 7, 130), int8: bool = True) -> None:
    matrix, dense = packed(form), form.decode()
    for path in paths():
        assert torch.equal(matrix.decode(path), dense), path
    for count in tokens:
        x = normal(count, dense.shape[1], seed=count)
        exact = x.double() @ dense.double().T
        terms = x.double().abs() @ dense.double().abs().T + 1e-30
        for path in paths():
            error = (matrix.multiply(x, path=path) - exact).abs() / terms
            assert float(error.max()) < 1e-5, (path, count)
        if int8:
            rounded = [matrix.multiply(x, int8=True, path=path) for path in paths()]
            assert all(torch.equal(rounded[0], other) for other in rounded), count
            # Each activation is off by half a step, at most a 254th of the largest of its block.
            bound = x.abs().amax(1, keepdim=True) / 254 * dense.abs().sum(1) * 1.001 + 1e-5
            assert bool(((rounded[0] - exact).abs() <= bound).all()), count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers(bits: int, kind: str):
    for (rows, columns), group in zip(SHAPES, (4, 12, 64, 0), strict=True):
        check(integer(rows, columns, bits, group, **KINDS[kind]), tokens=(1, 7))


@pytest.mark.parametrize("group", [4, 20, 32, 100, 128, 260, 512, 0])
def test_groups(group: int):
    check(integer(20, 700, 4, group))
    check(integer(20, 700, 3, group), tokens=(1,))


@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ternary_planes(planes: int, scale_bits: int):
    check(ternary(18, 300, 128, planes, scale_bits))
    check(ternary(5, 7, 0, planes, scale_bits), tokens=(1,))


@pytest.mark.parametrize("name", list(LEVELS))
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_codebooks(name: str, scale_bits: int):
    form = codebook(19, 100, name, scale_bits)
    check(form, int8=False)
    with pytest.raises(ValueError, match="int8"):
        packed(form).multiply(normal(1, 100), int8=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_activations_cost_less_than_a_hundredth(bits: int):
    form = integer(64, 512, bits, 64)
    x = normal(3, 512)
    exact = x @ form.decode().T
    for path in paths():
        found = packed(form).multiply(x, int8=True, path=path)
        assert float((found - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_products_have_the_same_bits_on_every_path(dtype: torch.dtype, tokens: int):
    matrix, x = packed(integer(40, 300, 4, 64, float_zero=True)), normal(tokens, 300).to(dtype)
    found = [matrix.multiply(x, path=path) for path in paths()]
    assert all(torch.equal(found[0], other) for other in found) and found[0].dtype == dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_have_the_bits_that_each_has_alone(bits: int, kind: str):
    """Sets that are full and not, several rounds of them, every digit, on every path."""
    form = packed(integer(40, 172, bits, 64, **KINDS[kind]))
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(63, 172).to(dtype)
        alone = torch.cat([form.multiply(x[i : i + 8]) for i in range(0, 63, 8)])
        for tokens in (9, 11, 12, 14, 63):
            for path in paths():
                assert torch.equal(form.multiply(x[:tokens], path=path), alone[:tokens]), (path, tokens)
    x = normal(203, 172, seed=1)
    alone = torch.cat([form.multiply(x[i : i + 8], int8=True) for i in range(0, 203, 8)])
    for tokens in (9, 15, 97, 203):
        for path in paths():
            assert torch.equal(form.multiply(x[:tokens], int8=True, path=path), alone[:tokens]), (path, tokens)


@pytest.mark.parametrize("zeros", [(0, 256), (127, 129), (128, 129), (200, 256)])
@pytest.mark.parametrize("form", ["int2", "int3", "int4", "int8"])
def test_zeros_that_are_no_codes(form: str, zeros: tuple[int, int]):
    """Any byte may be a zero: codes less their zeros are signed bytes, or they are not."""
    drawn = SAMPLES[form].draw(40, 300)
    assert drawn.zero is not None
    zero = torch.randint(*zeros, drawn.zero.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    stored = replace(drawn, zero=zero)
    matrix, x = PackedMatrix(stored), normal(61, 300)
    alone = torch.cat([matrix.multiply(x[i : i + 8], int8=True) for i in range(0, 61, 8)])
    for tokens in (10, 27, 61):
        for path in paths():
            assert torch.equal(matrix.multiply(x[:tokens], int8=True, path=path), alone[:tokens]), (path, tokens)
    exact, dense = x.double() @ reference(stored).double().T, reference(stored).double()
    terms = x.double().abs() @ dense.abs().T
    for path in paths():
        assert float(((matrix.multiply(x, path=path) - exact).abs() / terms).max()) < 1e-5


def test_values_that_are_not_finite_reach_their_own_token_alone():
    form, x = packed(integer(20, 96, 4, 32)), normal(20, 96)
    expected = form.multiply(x)
    x[3, 5], x[19, 90] = float("nan"), float("inf")
    for path in paths():
        found = form.multiply(x, path=path)
        assert bool(found[[3, 19]].isnan().all())
        others = [i for i in range(20) if i not in (3, 19)]
        assert torch.equal(found[others], expected[others])


def test_values_far_smaller_than_the_largest_of_their_block_are_kept_to_its_step():
    form = integer(20, 128, 4, 64, symmetric=True)
    x = normal(1, 128) * 1e-4
    x[0, 5], x[0, 70] = 1000.0, -1000.0
    exact = x.double() @ form.decode().double().T
    step = 1000 / 8355711
    for path in paths():
        error = (packed(form).multiply(x, path=path) - exact).abs()
        assert bool((error <= form.decode().abs().sum(1) * step + 1e-6 * exact.abs()).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_hot_inputs_show_every_code(bits: int):
    form = integer(21, 70, bits, 16)
    for path in paths():
        assert torch.allclose(packed(form).multiply(torch.eye(70), path=path).T, form.decode(), atol=1e-6)
        columns = torch.cat([packed(form).multiply(row[None], path=path) for row in torch.eye(70)])
        assert torch.allclose(columns.T, form.decode(), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_do_not_saturate(bits: int, sign: float):
    fitted = fit_grid(normal(16, 512), Grid(bits, 0))
    form = GroupedInteger.from_codes(torch.full((16, 512), 2**bits - 1, dtype=torch.uint8), fitted)
    x = torch.full((2, 512), sign)
    for path in paths():
        found = packed(form).multiply(x, int8=True, path=path)
        assert torch.allclose(found, x @ form.decode().T, rtol=1e-5)


def test_what_is_not_finite_surfaces():
    matrix = packed(integer(20, 64, 4, 32))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = normal(3, 64)
        x[1, 5] = bad
        for path in paths():
            for int8 in (False, True):
                found = matrix.multiply(x, int8=int8, path=path)
                assert not torch.isfinite(found[1]).any() and torch.isfinite(found[[0, 2]]).all()


def test_zeros_and_tiny_and_huge_inputs():
    form = integer(20, 64, 4, 32)
    for path in paths():
        for int8 in (False, True):
            assert not packed(form).multiply(torch.zeros(2, 64), int8=int8, path=path).any()
            assert torch.isfinite(packed(form).multiply(torch.full((1, 64), 1e-38), int8=int8, path=path)).all()
            found = packed(form).multiply(normal(1, 64) * 1e30, int8=int8, path=path) / 1e30
            assert torch.allclose(found, normal(1, 64) @ form.decode().T, atol=0.2)
    assert packed(form).multiply(torch.zeros(0, 64)).shape == (0, 20)


def test_results_do_not_depend_on_threads():
    matrix = packed(integer(600, 512, 4, 64))
    x = normal(3, 512)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append([matrix.multiply(x, int8=int8, path=path) for path in paths() for int8 in (False, True)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ["whole zeros", "symmetric", "float zeros"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_many_tokens_are_each_as_they_are_alone(bits: int, kind: str):
    """Whatever else is in a batch, a token's result has the same bits: it is added up in the same order."""
    matrix = packed(integer(40, 100, bits, 32, **KINDS[kind]))  # type: ignore[arg-type]
    for count in (9, 12, 33, 97, 205):  # one round of a panel and several, whole and with rests
        x = normal(count, 100, seed=count)
        for path in paths():
            for int8 in (True, False):
                if count >= 128 and not int8 and path != "avx512":
                    continue  # torch multiplies decoded panels there, in an order of its own
                together = matrix.multiply(x, int8=int8, path=path)
                for token in (0, 7, 8, count - 1):
                    alone = matrix.multiply(x[token : token + 1], int8=int8, path=path)
                    assert torch.equal(together[token : token + 1], alone), (path, count, token)


def test_many_tokens_of_more_blocks_than_are_kept():
    form = integer(33, 30 * 8, 4, 8)  # 30 blocks
    check(form, tokens=(100, 200))
    check(ternary(33, 300, 20, 2), tokens=(100,))
    matrix, x = packed(form), normal(200, 240)
    expected = matrix.multiply(x, int8=True)
    assert all(torch.equal(matrix.multiply(x, int8=True, path=path), expected) for path in paths())


def test_many_tokens_do_not_depend_on_threads():
    matrix, x = packed(integer(200, 256, 4, 64)), normal(130, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([matrix.multiply(x, int8=True, path=path) for path in paths()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][0], one) for several in found for one in several)


@pytest.mark.parametrize("form", ["integer", "factors", "codebook", "ternary"])
def test_a_bias_is_the_same_sum(form: str):
    made: dict[str, Encoded] = {
        "integer": integer(35, 96, 4, 32),
        "factors": integer(35, 96, 4, 32, scale_bits=8),
        "codebook": codebook(35, 96, "nf4", 16),
        "ternary": ternary(35, 96, 32, 2),
    }
    matrix, bias = packed(made[form]), normal(35, seed=9)
    for count in (1, 5, 40, 140):
        x = normal(count, 96)
        for path in paths():
            for int8 in (False, True) if form != "codebook" else (False,):
                expected = matrix.multiply(x, int8=int8, path=path) + bias
                assert torch.equal(matrix.multiply(x, int8=int8, path=path, bias=bias), expected), (path, count)


@pytest.mark.parametrize("path", paths())
def test_the_limit_of_large_batches_counts_its_products(path: str):
    loaded = library()
    assert loaded is not None
    one = loaded.layerwise_dots(path.encode(), 10, 1)
    assert one > 0 and one % 640 == 0 and loaded.layerwise_dots(path.encode(), 20, 2) in (2 * one, 4 * one)
    assert loaded.layerwise_dots(b"nowhere", 10, 1) == 0


@pytest.mark.parametrize("path", paths())
def test_unaligned_and_strided_memory(path: str):
    form = integer(20, 64, 4, 32)
    matrix, x = packed(form), normal(3, 64)
    expected = matrix.multiply(x, path=path)
    for shift in (1, 3):
        moved = torch.zeros(3 * 64 + 5)[shift : shift + 3 * 64].view(3, 64).copy_(x)
        assert torch.equal(matrix.multiply(moved, path=path), expected)
    wide = torch.cat([x, x], 1)[:, :64]
    assert wide.stride(0) == 128 and torch.equal(matrix.multiply(wide, path=path), expected)
    assert torch.equal(matrix.multiply(x.T.contiguous().T, path=path), expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("path", paths())
def test_nothing_is_touched_behind_the_ends(path: str, int8: bool):
    """Input and output end where memory ends: one value further is a page that must not be read or written."""
    form = integer(19, 70, 3, 32)
    matrix, x = packed(form), normal(1, 70)
    loaded = library()
    assert loaded is not None
    with guarded(70 * 4) as source, guarded(19 * 4) as target:
        ctypes.memmove(source.at, x.data_ptr(), 70 * 4)
        status = loaded.layerwise_multiply(
            matrix._handle, path.encode(), source.at, 1, 70, target.at, 19, None, 1 if int8 else 3, 1
        )  # fmt: skip
        found = torch.frombuffer(bytearray(ctypes.string_at(target.at, 19 * 4)), dtype=torch.float32)
    assert status == 0 and torch.equal(found[None], matrix.multiply(x, int8=int8, path=path))


class guarded:
    """Two pages of memory, the second one forbidden; ``at`` is ``size`` bytes before it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> guarded:
        page = mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        self.memory = mmap.mmap(-1, 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert libc.mprotect(start + page, page, 0) == 0
        self.libc, self.start, self.at = libc, start, start + page - self.size
        return self

    def __exit__(self, *_: object) -> None:
        self.libc.mprotect(self.start + mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_wrong_inputs_are_refused():
    matrix = packed(integer(8, 32, 4, 32))
    with pytest.raises(ValueError, match="activations are"):
        matrix.multiply(normal(2, 31))
    with pytest.raises(ValueError, match="no path"):
        matrix.multiply(normal(2, 32), path="neon")
    assert packed_matrix(integer(8, 33, 4, 6)) is None  # a group that no lane holds: the reference multiplies
