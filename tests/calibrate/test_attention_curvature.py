"""The curvature of attention in its queries, keys and values, against the derivatives that autograd takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.calibrate.attention import watching_attention
from layerwise.calibrate.attention_curvature import attention_curvature
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import reverse
from layerwise.calibrate.statistics import Wanted
from layerwise.network.streaming import Batch

HEADS, SIZE, WIDTH, LENGTH = 2, 3, 5, 7


class Attend(nn.Module):
    """Plain attention with heads of its own and an MLP-like linear behind it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.o, self.after, self.causal = nn.Linear(HEADS * SIZE, WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(x + self.attended(x))


def made(causal: bool) -> Attend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return Attend(causal).requires_grad_(False)


def found_by_watching(module: Attend, x: Tensor, batch: Batch) -> dict[str, Tensor]:
    names = {name: name for name in ("q", "k", "v", "o", "after")}
    with torch.enable_grad(), watching_attention(True) as calls, observing(module, names) as observer:
        module(x.clone().requires_grad_())
        return attention_curvature(calls, observer.seen, {n: module.get_submodule(n) for n in names}, batch)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_column_curvature_of_what_attention_returns(causal: bool) -> None:
    module, x = made(causal), torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if causal:
        mask[1, 4:] = 0  # padding at the end, which no query before it sees
    found = found_by_watching(module, x, Batch(torch.zeros(2, LENGTH, dtype=torch.int64), mask))
    assert set(found) == {"q", "k", "v"}
    for name in found:
        weight = module.get_submodule(name).weight

        def returned(w: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(Wrapped(module), {f"inner.{name}.weight": w}, (x,))[mask.bool()]

        jacobian = torch.func.jacrev(returned)(weight)  # [tokens, width, rows, columns]
        torch.testing.assert_close(found[name], torch.einsum("tmrj,tmrk->jk", jacobian, jacobian), rtol=1e-3, atol=1e-5)


class Wrapped(nn.Module):
    def __init__(self, inner: Attend) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.attended(x)


def test_attention_that_looks_at_one_token_leaves_queries_and_keys_free() -> None:
    module = made(causal=True)
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), None)
    x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))  # a text of one token
    found = found_by_watching(module, x, batch)
    assert float(found["q"].abs().max()) < 1e-10 and float(found["k"].abs().max()) < 1e-10
    expected = module.o.weight.square().sum() * x[0].T @ x[0]
    torch.testing.assert_close(found["v"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "have"),
    [
        ("tiny_llama", ("q_proj", "k_proj", "v_proj")),
        ("tiny_bert", ("query", "key", "value")),
        ("tiny_gpt2", ()),  # one matrix makes all three
    ],
)
def test_who_has_it(
    name: str, have: tuple[str, ...], sentences: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    network = layerwise.open(request.getfixturevalue(name))
    calibration = layerwise.calibrate(
        network, str(sentences), sequences=64, length=24, work=tmp_path / "work", threads=1
    )  # fmt: skip
    calibration = replace(calibration, wanted=Wanted(attention=True))
    for part in reverse(calibration, ()):
        for site, fitted in part.sites.items():
            use = fitted.fit.uses[0]
            assert (use.attention is not None) == (site.endswith(have) if have else False), site
            if use.attention is not None:
                assert use.attention.shape == use.inputs.shape and bool(use.attention.isfinite().all())
                assert fitted.judge.attention is not None
    calibration.journal.close()
