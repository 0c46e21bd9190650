"""The laws that every encoder obeys, run over the registry: a new encoder file is tested without naming it here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.roles import Encoder
from layerwise.technique import find, names

ENCODERS = names(Encoder)
SHAPES = [(1, 1), (5, 1), (1, 9), (7, 13), (6, 172), (70, 66)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(size: int, seed: int = 0) -> Tensor:
    mix = torch.randn(size, size, generator=generator(seed + 1))
    x = torch.randn(3 * size + 2, size, generator=generator(seed)) @ mix
    return x.T @ x / len(x)


def known(rows: Tensor, columns: Tensor) -> SiteStatistics:
    return SiteStatistics((Use(rows, columns, columns, diagonal_root(columns), 0.5, 100),))


def diagonal_root(side: Tensor) -> Tensor:
    return (side if side.dim() == 1 else side.diagonal()).clamp(min=0).sqrt()


def ordinary(rows: int, columns: int) -> tuple[Tensor, SiteStatistics]:
    weight = torch.randn(rows, columns, generator=generator(9)) * 0.05
    return weight, known(moment(rows), moment(columns, 5))


def fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored(encoded: Encoded) -> str:
    return fingerprint(*(t for _, t in sorted(encoded.tensors().items())))


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    made = find(request.param)()
    assert isinstance(made, Encoder)
    return made


def test_there_are_encoders() -> None:
    assert {"rtn", "gptq", "hqq", "two_sided"} <= set(ENCODERS)


def test_encoding_is_pure(encoder: Encoder) -> None:
    weight, statistics = ordinary(24, 70)
    inputs = (weight, statistics.rows, statistics.columns, statistics.absolute_mean)
    before, random_state = fingerprint(*inputs), torch.get_rng_state()
    first, second = encoder.encode(weight, statistics), encoder.encode(weight.clone(), statistics)
    assert stored(first) == stored(second) and first.spec() == second.spec()
    assert fingerprint(*inputs) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    decoded = first.decode()
    weight.zero_()
    assert torch.equal(first.decode(), decoded)


def test_a_weight_in_any_memory_order_gives_the_same(encoder: Encoder) -> None:
    weight, statistics = ordinary(24, 70)
    assert stored(encoder.encode(weight.T.contiguous().T, statistics)) == stored(encoder.encode(weight, statistics))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_bytes_and_restoring(encoder: Encoder, shape: tuple[int, int], tmp_path: Path) -> None:
    encoded = encoder.encode(*ordinary(*shape))
    tensors, layout = encoded.tensors(), encoder.layout(*shape)
    assert encoded.shape == shape
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == layout
    assert encoded.nbytes == layout_bytes(layout)
    assert "" in tensors and all(suffix == "" or suffix.startswith("_") for suffix in tensors)

    path = tmp_path / "form.safetensors"
    save_file({f"weight{suffix}": t.contiguous() for suffix, t in tensors.items()}, path)
    loaded = {name.removeprefix("weight"): t for name, t in load_file(path).items()}
    again = restore_form(encoded.spec(), loaded)
    assert torch.equal(again.decode(), encoded.decode())
    assert stored(again) == stored(encoded) and again.spec() == encoded.spec()


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (70, 66)], ids=str)
def test_rows_gathered_rows_and_products_agree_with_decode(encoder: Encoder, shape: tuple[int, int]) -> None:
    encoded = encoder.encode(*ordinary(*shape))
    whole = encoded.decode()
    rows, columns = shape
    assert whole.dtype == torch.float32 and tuple(whole.shape) == shape
    assert torch.equal(encoded.decode_rows(rows // 3, rows), whole[rows // 3 :])
    index = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert torch.equal(encoded.take_rows(index), whole[index])
    x = torch.randn(2, 3, columns, generator=generator(1))
    torch.testing.assert_close(encoded.multiply(x), x @ whole.T)


Make = Callable[[int, int], Tensor]
WEIGHTS: dict[str, Make] = {
    "zeros": torch.zeros,
    "constant": lambda m, n: torch.full((m, n), 0.7),
    "negative": lambda m, n: torch.full((m, n), -3.0),
    "huge": lambda m, n: torch.randn(m, n, generator=generator(0)) * 1e4,
    "tiny": lambda m, n: torch.randn(m, n, generator=generator(0)) * 1e-7,
    "vanishing": lambda m, n: torch.randn(m, n, generator=generator(0)) * 1e-30,
    "one outlier": lambda m, n: torch.cat([torch.full((1, n), 1e4), torch.full((m - 1, n), 1e-3)]).T.reshape(m, n),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_odd_weights_survive(encoder: Encoder, kind: str) -> None:
    weight = WEIGHTS[kind](6, 70)
    _, statistics = ordinary(6, 70)
    decoded = encoder.encode(weight, statistics).decode()
    assert bool(torch.isfinite(decoded).all())
    if kind == "zeros":
        assert bool((decoded == 0).all())
    assert float(decoded.abs().max()) <= 2 * float(weight.abs().max()) + 1e-6


def sides(size: int) -> dict[str, Tensor]:
    vector = torch.randn(size, generator=generator(3))
    holed = moment(size)
    holed[0], holed[:, 0] = 0, 0
    return {
        "diagonal": torch.rand(size, generator=generator(4)),
        "zero": torch.zeros(size, size),
        "zero diagonal": torch.zeros(size),
        "constant": torch.ones(size, size),
        "rank one": torch.outer(vector, vector),
        "huge": moment(size) * 1e30,
        "vanishing": moment(size) * 1e-36,
        "unreached column": holed,
        "not quite positive": moment(size) - 0.05 * moment(size).diagonal().mean() * torch.eye(size),
    }


@pytest.mark.parametrize("row_side", [*sides(2), "whole"])
@pytest.mark.parametrize("column_side", [*sides(2), "whole"])
def test_any_statistics_give_finite_weights(encoder: Encoder, row_side: str, column_side: str) -> None:
    weight, _ = ordinary(12, 20)
    rows, columns = sides(12) | {"whole": moment(12)}, sides(20) | {"whole": moment(20)}
    decoded = encoder.encode(weight, known(rows[row_side], columns[column_side])).decode()
    assert bool(torch.isfinite(decoded).all())
    assert float((decoded - weight).abs().max()) <= 2 * float(weight.abs().max())
    squares = columns[column_side] if columns[column_side].dim() == 1 else columns[column_side].diagonal()
    if encoder.family != "prune" or not float(squares[0]) > 0:
        assert float(decoded[:, 0].abs().max()) > 0  # no column is wiped out, reached or not, but on evidence


def test_a_site_about_which_nothing_is_known(encoder: Encoder) -> None:
    weight, _ = ordinary(12, 20)
    weight = weight * 0.6 ** torch.arange(12)[:, None]  # a spectrum that falls, as those of trained weights do
    decoded = encoder.encode(weight, SiteStatistics.uninformed(12, 20)).decode()
    few = layout_bytes(encoder.layout(512, 512)) < 512 * 512 / 4  # under two bits: a sign alone leaves 0.36
    limit = 0.4 if few else 0.15
    assert float((decoded - weight).square().mean()) < limit * float(weight.square().mean())  # all of it if left out
