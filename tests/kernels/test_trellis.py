"""Products of trellises: every width, ring, path and edge against the stored form's own decoding."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tests.kernels.test_encoder import by_torch, drawn
from tests.kernels.test_products import check, normal, packed

from layerwise.encoding import repacked
from layerwise.encoding.repacked import canonical, described, packed_matrix, packed_table
from layerwise.encoding.scales import Scales, groups_of
from layerwise.encoding.trellis import Trellis
from layerwise.encoding.trellis_tables import MOST_BITS
from layerwise.kernels import gpu
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.matrix import Canonical, PackedMatrix
from layerwise.kernels.samples import SAMPLES, Sample

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

BITS = range(1, MOST_BITS + 1)
SIZES = (
    (1, 4, 4),
    (31, 30, 12),
    (33, 172, 64),
    (65, 301, 0),
)  # rows, columns, group: strips that are not full, and are


def trellis(rows: int, columns: int, bits: int, group: int, scale_bits: int = 16, seed: int = 0) -> Trellis:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=g)
    wanted = torch.rand(rows, groups_of(group, columns), generator=g) + 0.1
    return Trellis.from_codes(codes, bits, group, Scales.of(wanted, scale_bits))


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bits", BITS)
def test_products(bits: int, scale_bits: int):
    for rows, columns, group in SIZES:
        check(trellis(rows, columns, bits, group, scale_bits), tokens=(1, 2, 7))


@pytest.mark.parametrize("group", [4, 20, 32, 128, 260, 512, 0])
def test_groups(group: int):
    for bits in (2, 3, 4):
        check(trellis(40, 700, bits, group), tokens=(1, 130))


@pytest.mark.parametrize("bits", BITS)
def test_a_token_has_the_bits_that_it_has_alone(bits: int):
    """Whatever it is multiplied with, by few and by many, in full sets and others, on every path."""
    matrix = packed(trellis(65, 172, bits, 64))
    x = normal(203, 172)
    for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        given = x.to(dtype) if int8 else x[:63].to(dtype)  # more of floats are torch's on some paths
        alone = torch.cat([matrix.multiply(row[None], int8=int8, path="portable") for row in given])
        for count in (1, 2, 3, 5, 9, 33, len(given)):
            for path in paths():
                found = matrix.multiply(given[:count], int8=int8, path=path)
                assert torch.equal(found, alone[:count]), (path, count, dtype, int8)


@pytest.mark.parametrize("bits", BITS)
def test_every_state_is_looked_up(bits: int):
    """All 256 of them, on every path, each with a value of its own."""
    form = trellis(64, 512, bits, 0)
    stored = canonical(form)
    assert stored is not None
    values = torch.arange(-128, 128).to(torch.int8)[torch.randperm(256, generator=torch.Generator().manual_seed(bits))]
    matrix = PackedMatrix(replace(stored, values=values, scale=torch.ones_like(stored.scale)))
    wanted = matrix.decode("portable")
    assert len(wanted.unique()) == 256
    for path in paths():
        assert torch.equal(matrix.decode(path), wanted)
        assert torch.allclose(matrix.multiply(torch.eye(512)[:1], path=path)[0], wanted[:, 0], atol=1e-5)
        assert torch.allclose(matrix.multiply(torch.eye(512), int8=True, path=path).T, wanted, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_do_not_saturate(bits: int, sign: float):
    stored = canonical(trellis(32, 512, bits, 0))
    assert stored is not None
    for value in (-128, 127):
        matrix = PackedMatrix(replace(stored, values=torch.full((256,), value, dtype=torch.int8)))
        x = torch.full((9, 512), sign)
        for path in paths():
            for tokens in (1, 9):
                found = matrix.multiply(x[:tokens], int8=True, path=path)
                assert torch.allclose(found, x[:tokens] @ matrix.decode().T, rtol=1e-5)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_looked_up(bits: int, scale_bits: int):
    """Each with the rows above it in its strip, of which the last strip may lack some."""
    for rows, columns, group in SIZES:
        form = trellis(rows, columns, bits, group, scale_bits)
        table = packed_table(form)
        if table is None:
            assert columns % 4 and group % 4
            continue
        index = torch.cat([torch.arange(rows).flip(0), torch.tensor([0, rows // 2, 0])])
        assert torch.equal(table.take(index), form.decode()[index])
        with pytest.raises(IndexError):
            table.take(torch.tensor([rows]))


def test_results_do_not_depend_on_threads():
    matrix = packed(trellis(600, 512, 3, 64))
    x = normal(40, 512)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([matrix.multiply(x[:count], path=path) for path in paths() for count in (1, 2, 40)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_bias_and_what_is_not_finite():
    matrix, bias = packed(trellis(35, 96, 2, 32)), normal(35, seed=9)
    for count in (1, 5, 40):
        x = normal(count, 96)
        for path in paths():
            expected = matrix.multiply(x, path=path) + bias
            assert torch.equal(matrix.multiply(x, path=path, bias=bias), expected)
            broken = x.clone()
            broken[count - 1, 5] = float("nan")
            found = matrix.multiply(broken, path=path, bias=bias)
            assert bool(found[-1].isnan().all()) and torch.equal(found[:-1], expected[:-1])


def test_an_encoders_block_takes_them():
    """Beside integers, which are as wide and are multiplied with other numbers of tokens at a time."""
    block = drawn(64, 112, 2, [Sample(4, 32, trellis=True), Sample(4, 32), Sample(2, 32, trellis=True)])
    for tokens in (1, 5, 40):
        x = normal(3, tokens, 64)
        for int8 in (False, True):
            found = [block.run(x, None, int8=int8, path=p, together=t) for p in paths() for t in (0, -1, 1)]
            assert all(torch.equal(found[0], other) for other in found)
            expected = by_torch(block, x, None, int8)
            assert float((found[0] - expected).norm() / expected.norm()) < (1e-3 if int8 else 1e-5)


def test_what_does_not_fit_is_refused():
    stored = canonical(trellis(40, 64, 3, 32))
    assert stored is not None and stored.values is not None
    wrong = (
        {"centre": 4}, {"bits": 6}, {"bits": 8}, {"bits": 0}, {"planes": 2}, {"trits": True}, {"rows": 41},
        {"zero": torch.zeros(40, 2, dtype=torch.uint8)}, {"values": stored.values[:255]},
        {"values": stored.values.float()}, {"values": None}, {"levels": torch.zeros(16), "bits": 4},
    )  # fmt: skip
    for changes in wrong:
        with pytest.raises(ValueError):
            PackedMatrix(Canonical(**{**vars(stored), **changes}))
    assert packed_matrix(trellis(8, 33, 4, 6)) is None  # a group that no lane holds: the reference multiplies


def test_a_gpu_decodes_them_and_says_so(monkeypatch: pytest.MonkeyPatch):
    form = trellis(40, 64, 3, 32)
    with pytest.raises(ValueError, match="do not fit"):
        gpu.TritonMatrix(described(form))  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "why_decoded", lambda device: "")
    gpu._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="trellis"):
        assert repacked.triton_matrix(form) is None


def test_random_ones_are_measured():
    for name in ("trellis2", "trellis3", "trellis4"):
        matrix = SAMPLES[name].packed(64, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert matrix.multiply(normal(1, 256)).shape == (1, 64)
