"""Blocks of a decoder by the library: against torch, on every path, for any threads and any split of a text."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.kernels.decoder import LINEARS, Block, Decoding, Head, PackedDecoder, Shape, takes
from layerwise.kernels.encoder import Norm
from layerwise.kernels.library import library, paths, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.samples import Sample

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

EIGHT, FOUR, WHOLE, LEVELS = Sample(8), Sample(4, 32), Sample(3, 4096), Sample(4, levels=True)
TRELLIS = Sample(4, 32, trellis=True)
WORDS = 45


def matrix(rows: int, columns: int, sample: Sample, seed: int) -> PackedMatrix:
    stored = sample.draw(rows, columns, seed)
    stored.scale.mul_(4.0 / columns**0.5)  # outputs about as large as inputs
    return PackedMatrix(stored)


def drawn(
    shape: Shape,
    inner: int,
    samples: Sequence[Sample],
    blocks: int = 2,
    biases: bool = True,
    windows: Sequence[int | None] = (None, None),
    head_norms: bool = False,
) -> PackedDecoder:
    g = torch.Generator().manual_seed(5)
    asking, offering, width = shape.heads * shape.dim, shape.groups * shape.dim, shape.width
    sizes = [(asking, width), (offering, width), (offering, width), (width, asking)]
    sizes += [(inner, width), (inner, width), (width, inner)]

    def vector(rows: int, size: float = 0.1) -> Tensor | None:
        return torch.randn(rows, generator=g) * size if biases else None

    def norm() -> Norm:
        return Norm(torch.rand(width, generator=g) + 0.5, vector(width), 1e-5)

    def of_heads() -> tuple[Norm, Norm] | None:
        made = [Norm(torch.rand(shape.dim, generator=g) + 0.5, None, e) for e in (1e-6, 1e-2)]
        return (made[0], made[1]) if head_norms else None

    made = []
    for b in range(blocks):
        own = [matrix(*size, samples[(i + b) % len(samples)], 10 * b + i) for i, size in enumerate(sizes)]
        made.append(Block(tuple(own), tuple(vector(m.rows) for m in own), (norm(), norm()), windows[b], of_heads()))
    head = Head(norm(), matrix(WORDS, width, samples[0], 99), vector(WORDS))
    return PackedDecoder(shape, made, head)


def turns(capacity: int, turned: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, turned, 2) / turned)
    both = torch.cat([angles, angles], 1)
    return both.cos().contiguous(), both.sin().contiguous()


class Text:
    """A cache of its own over a decoder."""

    def __init__(self, decoder: PackedDecoder, rows: int, capacity: int, turned: int | None = None) -> None:
        shape, blocks = decoder.shape, len(decoder.blocks)
        self.decoder, self.turns = decoder, turns(capacity, shape.dim if turned is None else turned)
        self.keys = [torch.full((rows, shape.groups, capacity, shape.dim), float("nan")) for _ in range(blocks)]
        self.values = [keys.clone() for keys in self.keys]
        self.decoding = decoder.over(self.keys, self.values, self.turns)

    def run(self, x: Tensor, starts: Sequence[int], **given: Any) -> Tensor:
        return self.decoding.run(x, range(len(self.decoder.blocks)), starts, **given)


def by_torch(decoder: PackedDecoder, x: Tensor, tables: tuple[Tensor, Tensor], int8: bool) -> Tensor:
    """Whole texts without a cache: the same products, everything between them by torch."""
    shape, (rows, count) = decoder.shape, x.shape[:2]
    cosine, sine = (table[:count] for table in tables)
    turned = cosine.shape[1]

    def normed(norm: Norm, y: Tensor) -> Tensor:
        if shape.centred:
            return nn.functional.layer_norm(y, (shape.width,), norm.weight, norm.shift, norm.epsilon)
        y = nn.functional.rms_norm(y, (shape.width,), norm.weight, norm.epsilon)
        return y if norm.shift is None else y + norm.shift

    def turn(y: Tensor) -> Tensor:
        first, rest = y[..., :turned], y[..., turned:]
        a, b = first.chunk(2, -1)
        return torch.cat([first * cosine + torch.cat([-b, a], -1) * sine, rest], -1)

    def split(y: Tensor, norm: Norm | None = None) -> Tensor:
        y = y.view(rows, count, -1, shape.dim).transpose(1, 2)
        return y if norm is None else nn.functional.rms_norm(y, (shape.dim,), norm.weight, norm.epsilon)

    for block in decoder.blocks:
        query, key, value, out, gate, up, down = (
            lambda y, m=m, b=b: m.multiply(y, int8=int8 and not m.table, bias=b)
            for m, b in zip(block.matrices, block.biases, strict=True)
        )
        given = normed(block.norms[0], x)
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        if block.window is not None:
            seen &= ~torch.ones(count, count, dtype=torch.bool).tril(-block.window)
        of_queries, of_keys = block.head_norms or (None, None)
        shared = shape.heads // shape.groups
        k, v = turn(split(key(given), of_keys)), split(value(given))
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        q = turn(split(query(given), of_queries))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=shape.scale)
        x = x + out(attended.transpose(1, 2).reshape(rows, count, -1))
        given = normed(block.norms[1], x)
        x = x + down(nn.functional.silu(gate(given)) * up(given))
    return x


SHAPES = [  # shape, inner, samples, biases, windows, turned
    (Shape(64, 2, 2, 32, 32**-0.5), 133, [FOUR], False, (None, None), 32),
    (Shape(48, 6, 3, 16, 0.3), 96, [FOUR, WHOLE, EIGHT], True, (None, 4), 8),
    (Shape(96, 3, 1, 80, 0.1), 20, [EIGHT], True, (7, 1), 80),
    (Shape(64, 4, 2, 64, 0.125, centred=True), 64, [EIGHT, LEVELS], True, (None, None), 0),
    (Shape(64, 2, 2, 32, 32**-0.5), 112, [TRELLIS, FOUR], True, (None, None), 32),
]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", SHAPES)
def test_values_are_torchs_and_the_same_bits_on_every_path_and_split(case: tuple[Any, ...], int8: bool):
    shape, inner, samples, biases, windows, turned = case
    decoder = drawn(shape, inner, samples, biases=biases, windows=windows, head_norms=inner == 96)
    rows, count = 2, 21
    x = torch.randn(rows, count, shape.width, generator=torch.Generator().manual_seed(1))
    whole = LEVELS not in samples  # products with places in a table add floats in an order of each path's own
    first = None
    for path in paths():
        found = []
        for cuts in ([count], [20, 1], [1] * count, [3, 9, 9])[: 4 if path == paths()[0] else 2]:
            text, parts, start = Text(decoder, rows, count + 3, turned), [], 0
            for cut in cuts:
                parts.append(text.run(x[:, start : start + cut], [start] * rows, int8=int8, path=path))
                start += cut
            found.append(torch.cat(parts, 1))
        first = found[0] if first is None or not whole else first
        assert all(torch.equal(first, other) for other in found)
        expected = by_torch(decoder, x, text.turns, int8)
        assert float((found[0] - expected).norm() / expected.norm()) < (1e-2 if int8 else 1e-5)


def test_threads_change_no_bit_and_rows_may_begin_anywhere():
    shape = Shape(64, 4, 2, 32, 0.2)
    decoder = drawn(shape, 96, [Sample(8, 32)] * 2, blocks=4, windows=[None] * 4)
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(2))
    lengths, before, found = [5, 30, 18], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            text = Text(decoder, 3, 60)
            prefilled = text.run(x, [0, 0, 0], int8=True)
            behind = text.run(x[:, :2], lengths, int8=True)
            scores = text.decoding.scores(x[:, 2:3], [n + 2 for n in lengths], int8=True)
            found.append([prefilled, behind, scores])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    for row, length in enumerate(lengths):  # each row by itself, without what its cache held behind its end
        text = Text(decoder, 1, 60)
        text.run(x[row : row + 1, :length], [0], int8=True)
        assert torch.equal(text.run(x[row : row + 1, :2], [length], int8=True)[0], found[0][1][row])
        assert torch.equal(text.decoding.scores(x[row : row + 1, 2:3], [length + 2], int8=True)[0], found[0][2][row])


@pytest.mark.parametrize("int8", [False, True])
def test_blocks_one_by_one_and_the_head_by_itself_are_the_whole(int8: bool):
    decoder = drawn(Shape(64, 2, 1, 32, 0.2), 96, [FOUR], blocks=3, windows=[None] * 3)
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3))
    text, parts = Text(decoder, 1, 8), Text(decoder, 1, 8)
    whole, states = text.run(x, [0], int8=int8), x
    for block in range(3):
        states = parts.decoding.run(states, range(block, block + 1), [0], int8=int8)
    assert torch.equal(whole, states)
    scores = text.decoding.scores(x, [0], int8=int8)
    assert torch.equal(scores, decoder.scores(whole, int8=int8)) and scores.shape == (1, 6, WORDS)
    assert torch.equal(scores[:, 4], decoder.scores(whole[:, 4], int8=int8))
    assert decoder.head is not None
    norm, head = decoder.head.norm, decoder.head
    normed = nn.functional.rms_norm(whole, (64,), norm.weight, norm.epsilon) + norm.shift
    expected = head.matrix.multiply(normed, int8=int8, bias=head.bias)
    assert float((scores - expected).norm() / expected.norm()) < (1e-2 if int8 else 1e-5)


def test_a_long_text_token_by_token():
    decoder = drawn(Shape(64, 2, 2, 32, 0.2), 64, [EIGHT], windows=(None, 100))
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(4))
    text = Text(decoder, 1, 300)
    found = torch.cat([text.run(x[:, t : t + 1], [t], int8=False) for t in range(300)], 1)
    expected = by_torch(decoder, x, text.turns, False)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    again = text.run(x[:, 17:20], [17], int8=False)  # back to an earlier place: what lies behind it does not count
    assert torch.equal(again, found[:, 17:20])


def test_what_is_no_number_stays_in_its_text():
    decoder = drawn(Shape(64, 2, 1, 32, 0.2), 96, [FOUR])
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(6))
    clean = Text(decoder, 2, 6).run(x, [0, 0], int8=True)
    x[0, 2, 7] = float("nan")
    found = Text(decoder, 2, 6).run(x, [0, 0], int8=True)
    assert found[0, 2:].isnan().all() and torch.equal(found[0, :2], clean[0, :2]) and torch.equal(found[1], clean[1])


def test_gates_far_out():
    """A gate of any size: x / (1 + e^-x), by matrices that hand the norm's shift through."""
    from layerwise.kernels.matrix import Canonical

    def stored(codes: Tensor) -> PackedMatrix:
        return PackedMatrix(Canonical(32, 32, 8, 32, codes.byte(), torch.ones(32, 1).half(), centre=128))

    zero, one = stored(torch.full((32, 32), 128)), stored(torch.eye(32) + 128)
    sizes = torch.tensor([0.0, 1e-6, 0.5, 3, 20, 86, 88, 200]).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(
        8
    )
    shift = torch.cat([sizes, torch.linspace(-30, 30, 16)])
    norm = Norm(torch.zeros(32), shift, 1e-5)
    biases = (None, None, None, None, None, torch.ones(32), None)
    block = Block((zero,) * 4 + (one, zero, one), biases, (Norm(torch.ones(32), None, 1e-5), norm))
    found = Text(PackedDecoder(Shape(32, 1, 1, 32, 1.0), [block]), 1, 1).run(torch.zeros(1, 1, 32), [0], int8=False)[
        0, 0
    ]
    expected = nn.functional.silu(shift)
    assert torch.allclose(found, expected, rtol=2e-6, atol=2e-6 * 200)  # rounded to three digits of the largest
    assert bool(((found - expected).abs() <= 2e-5 + 1e-6 * expected.abs()).all())


def test_what_it_does_not_take():
    shape = Shape(64, 2, 1, 32, 0.2)
    decoder = drawn(shape, 96, [EIGHT])
    text = Text(decoder, 2, 8)
    x = torch.randn(2, 3, 64)
    assert takes(x, 64) and decoder.in_place() and not decoder.wants_gradient()
    for wrong in (x.double(), x[0], x[..., :32], x[:1], x.clone().requires_grad_(), x[:, :0]):
        with pytest.raises(ValueError, match="hidden states are float32"):
            text.run(wrong, [0, 0], int8=True)
    for starts in ([0, 6], [-1, 0]):
        with pytest.raises(ValueError, match="do not fit into the cache"):
            text.run(x, starts, int8=True)
    with pytest.raises(ValueError, match="hidden states"):
        text.run(x, [0], int8=True)
    for blocks in (range(0), range(1, 3), range(0, 2, 2)):
        with pytest.raises(ValueError, match="there are blocks 0 to 1"):
            text.decoding.run(x, blocks, [0, 0], int8=True)
    with pytest.raises(ValueError, match="no path"):
        text.run(x, [0, 0], int8=True, path="neon")
    with pytest.raises(ValueError, match="caches are float32"):
        decoder.over(text.keys[:1], text.values[:1])
    with pytest.raises(ValueError, match="caches are float32"):
        decoder.over([k.double() for k in text.keys], text.values)
    with pytest.raises(ValueError, match="cosines and sines"):
        decoder.over(text.keys, text.values, turns(8, 34))
    short = decoder.over(text.keys, text.values, turns(4, 32))  # tables for fewer positions than the cache has
    with pytest.raises(ValueError, match="tables of angles"):
        short.run(x, range(2), [0, 2], int8=True)
    block = decoder.blocks[0]
    with pytest.raises(ValueError, match="matrices of a block"):
        PackedDecoder(shape, [Block(block.matrices[::-1], block.biases, block.norms)])
    with pytest.raises(ValueError, match="biases and norms"):
        PackedDecoder(shape, [Block(block.matrices, (torch.zeros(3), *block.biases[1:]), block.norms)])
    for odd in (
        Shape(72, 2, 1, 32, 1.0),
        Shape(64, 2, 1, 24, 1.0),
        Shape(64, 2, 1, 272, 1.0),
        Shape(64, 3, 2, 32, 1.0),
    ):
        with pytest.raises(ValueError):
            PackedDecoder(odd, [])
    with pytest.raises(ValueError, match="no head"):
        PackedDecoder(shape, decoder.blocks).scores(x, int8=True)
    assert len(LINEARS) == len(block.matrices)


def test_the_library_checks_sizes_itself():
    """What Python would never hand over: every number that could lead out of an array is refused."""
    loaded, decoder = library(), drawn(Shape(64, 2, 1, 32, 0.2), 96, [EIGHT])
    assert loaded is not None
    text, x = Text(decoder, 1, 8), torch.randn(1, 2, 64)
    y = torch.empty_like(x)

    def status(**wrong: Any) -> int:
        asked, _ = Decoding._asked(text.decoding, x, range(2), [0])
        asked.x, asked.y, asked.digits, asked.path = x.data_ptr(), y.data_ptr(), 1, paths()[0].encode()
        for name, value in wrong.items():
            setattr(asked, name, value)
        return int(loaded.layerwise_continue(ctypes.byref(asked), ctypes.sizeof(asked), 1))

    assert status() == 0
    for wrong in (
        {"rows": 0}, {"count": 0}, {"count": -1}, {"count": 9}, {"rows": 1 << 62}, {"width": 48}, {"width": 0},
        {"heads": 4}, {"heads": 0}, {"groups": 2}, {"groups": 0}, {"dim": 16}, {"dim": 1 << 40}, {"capacity": 1},
        {"blocks": -1}, {"origin": 1}, {"origin": -1},
        {"turns": 1}, {"turned": 33}, {"turned": 34}, {"turned": -2}, {"digits": 0}, {"digits": 4},
        {"x": None}, {"y": None}, {"starts": None}, {"block": None}, {"cosine": None},
    ):  # fmt: skip
        assert status(**wrong) == 4, wrong
    assert status(path=b"neon") == 1
    head = decoder.head
    assert head is not None
    assert status(head=head.matrix.handle) == 4  # with nowhere to put the scores
    assert int(loaded.layerwise_continue(None, 0, 1)) == 4
