"""A block of an encoder by the library: against torch, on every path, for any number of threads and any split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.kernels.encoder import LINEARS, Norm, PackedBlock, takes
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.samples import Sample

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


def matrix(rows: int, columns: int, sample: Sample, seed: int) -> PackedMatrix:
    stored = sample.draw(rows, columns, seed)
    stored.scale.mul_(4.0 / columns**0.5)  # outputs about as large as inputs
    return PackedMatrix(stored)


def drawn(
    width: int, inner: int, heads: int, samples: list[Sample], *, first: bool = False, biases: bool = True
) -> PackedBlock:
    g = torch.Generator().manual_seed(5)
    shapes = [(width, width)] * 4 + [(inner, width), (width, inner)]
    matrices = tuple(matrix(*shapes[i], samples[i % len(samples)], i) for i in range(len(LINEARS)))
    own = tuple(torch.randn(m.rows, generator=g) * 0.1 if biases else None for m in matrices)
    norms = tuple(
        Norm(torch.rand(width, generator=g) + 0.5, torch.randn(width, generator=g) if biases else None, epsilon)
        for epsilon in (1e-12, 1e-5)
    )
    return PackedBlock(matrices, own, (norms[0], norms[1]), heads, scale=(width // heads) ** -0.5, norms_first=first)


def by_torch(block: PackedBlock, x: Tensor, mask: Tensor | None, int8: bool, path: str | None = None) -> Tensor:
    """The same products, everything between them by torch."""
    query, key, value, out, up, down = (
        lambda y, m=m, b=b: m.multiply(y, int8=int8, path=path, bias=b)
        for m, b in zip(block.matrices, block.biases, strict=True)
    )

    def norm(which: int, y: Tensor) -> Tensor:
        own = block.norms[which]
        return nn.functional.layer_norm(y, (block.width,), own.weight, own.shift, own.epsilon)

    def split(y: Tensor) -> Tensor:
        return y.view(*x.shape[:2], block.heads, -1).transpose(1, 2)

    given = norm(0, x) if block.norms_first else x
    attended = nn.functional.scaled_dot_product_attention(
        split(query(given)), split(key(given)), split(value(given)), mask, scale=block.scale
    )
    state = x + out(attended.transpose(1, 2).reshape(x.shape))
    if block.norms_first:
        return state + down(nn.functional.gelu(up(norm(1, state))))
    state = norm(0, state)
    return norm(1, state + down(nn.functional.gelu(up(state))))


SHAPES = [  # sequences, tokens, width, inner, heads
    (3, 7, 64, 133, 2),
    (1, 33, 96, 96, 1),
    (5, 1, 64, 20, 1),
    (2, 40, 128, 260, 4),
]
EIGHT, FOUR, WHOLE = Sample(8), Sample(4, 32), Sample(3, 4096)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_torchs_and_the_same_bits_on_every_path_and_split(shape: tuple[int, ...], first: bool):
    sequences, tokens, width, inner, heads = shape
    # Matrices of one width are rounded to once, of several widths and groups each for itself.
    block = drawn(width, inner, heads, [FOUR] if tokens > 7 else [FOUR, WHOLE, EIGHT], first=first, biases=tokens != 1)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sequences, tokens, width, generator=g)
    masks: list[Tensor | None] = [None, torch.rand(sequences, 1, tokens, tokens, generator=g) > 0.3]
    masks[1][..., 0] = True  # type: ignore[index]
    for mask in masks:
        for int8 in (False, True):
            here = list(paths()) if mask is None else list(paths())[:1]
            found = [block.run(x, mask, int8=int8, path=p, together=t) for p in here for t in (0, -1, 1, 2)]
            assert all(torch.equal(found[0], other) for other in found)
            expected = by_torch(block, x, mask, int8)
            # An input of a product that torch's norm leaves a hair below half a step goes to the other whole number.
            close = (found[0] - expected).abs() <= 1e-5 * (1 + expected.abs())
            assert bool(close.all()) if not int8 else float(close.float().mean()) > 0.9
            assert float((found[0] - expected).norm() / expected.norm()) < (1e-5 if not int8 else 1e-3)


def test_threads_change_no_bit():
    block = drawn(64, 96, 2, [EIGHT])
    x = torch.randn(9, 20, 64, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [block.run(x, int8=True, together=t) for t in (0, -1, 2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("int8", [False, True])
def test_a_padded_batch_is_its_texts(int8: bool):
    block = drawn(64, 96, 2, [FOUR])
    g = torch.Generator().manual_seed(3)
    texts = [torch.randn(1, length, 64, generator=g) for length in (5, 18, 1, 40)]
    padded, mask = torch.randn(4, 40, 64, generator=g), torch.zeros(4, 1, 1, 40, dtype=torch.bool)
    for i, text in enumerate(texts):
        padded[i, : text.shape[1]], mask[i, ..., : text.shape[1]] = text[0], True
    for seen in (mask, mask.expand(4, 1, 40, 40), mask.expand(4, 1, 40, 40).contiguous()):
        found = block.run(padded, seen, int8=int8)
        for i, text in enumerate(texts):
            assert torch.equal(found[i, : text.shape[1]], block.run(text, int8=int8)[0])


def test_gelu_far_out_and_what_is_no_number():
    """Values of every size go through GELU, by a first product that is the identity times the input's size."""
    identity = torch.eye(32, dtype=torch.uint8) + 128
    from layerwise.kernels.matrix import Canonical

    one = PackedMatrix(Canonical(32, 32, 8, 32, identity, torch.ones(32, 1).half(), centre=128))
    zero = PackedMatrix(
        Canonical(32, 32, 8, 32, torch.full((32, 32), 128).byte(), torch.ones(32, 1).half(), centre=128)
    )
    shift = torch.linspace(-9, 9, 32)
    norm = Norm(torch.zeros(32), shift, 1e-5)
    plain = (zero,) * 4 + (one, one)
    block = PackedBlock(plain, (None,) * 6, (Norm(torch.ones(32), None, 1e-5), norm), 1, scale=1.0, norms_first=True)
    x = torch.zeros(1, 2, 32)
    found = block.run(x, int8=False)
    assert float((found[0, 0] - nn.functional.gelu(shift)).abs().max()) < 2e-6
    x[0, 1, 3] = float("nan")
    spoiled = block.run(x, int8=True, together=-1)
    assert spoiled[0, 1].isnan().all()


def test_what_it_does_not_take():
    block = drawn(64, 96, 2, [EIGHT])
    x = torch.randn(2, 5, 64)
    assert takes(x, None, 64) and block.in_place() and not block.wants_gradient()
    wrong = [x.double(), x[0], x[..., :32], torch.randn(1, 1025, 64), x.clone().requires_grad_(), torch.randn(1, 0, 64)]
    for other in wrong:
        with pytest.raises(ValueError, match="a block takes"):
            block.run(other, int8=True)
    for mask in (torch.zeros(2, 1, 5, 5), torch.ones(2, 2, 5, 5).bool(), torch.ones(2, 5).bool()):
        with pytest.raises(ValueError, match="a block takes"):
            block.run(x, mask, int8=True)
    with pytest.raises(ValueError, match="no path"):
        block.run(x, int8=True, path="neon")
    assert block.run(torch.randn(0, 5, 64), int8=True).shape == (0, 5, 64)
    m, norms = block.matrices, block.norms
    with pytest.raises(ValueError, match="a block has four"):
        PackedBlock((*m[:4], m[5], m[4]), block.biases, norms, 2, scale=1.0, norms_first=False)
    with pytest.raises(ValueError, match="heads"):
        PackedBlock(m, block.biases, norms, 4, scale=1.0, norms_first=False)
    with pytest.raises(ValueError, match="biases and norms"):
        PackedBlock(m, (torch.zeros(3), *block.biases[1:]), norms, 2, scale=1.0, norms_first=False)
