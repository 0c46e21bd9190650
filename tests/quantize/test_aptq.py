"""APTQ: GPTQ where nothing is known of attention, and less error of what attention returns where it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.attention import watching_attention
from layerwise.calibrate.attention_curvature import attention_curvature
from layerwise.calibrate.observer import observing
from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_technique

HEADS, SIZE, WIDTH = 2, 16, 48


def encode(recipe: str, weight: Tensor, statistics: SiteStatistics) -> Any:
    encoder: Any = parse_technique(recipe)
    return encoder.encode(weight, statistics)


@pytest.mark.parametrize("options", ["", ",act_order=false", ",symmetric=true", ",scale_bits=8"])
def test_without_attention_it_is_gptq(options: str, weight: Tensor, moments: Any, site: Any) -> None:
    known = site(torch.ones(40), moments(72)[0])
    vanishing = SiteStatistics((replace(known.uses[0], attention=torch.zeros(72, 72)),))
    expected = encode(f"gptq:bits=3,group=32{options}", weight, known)
    for statistics in (known, vanishing):
        found = encode(f"aptq:bits=3,group=32{options}", weight, statistics)
        assert torch.equal(found.codes(), expected.codes()) and torch.equal(found.decode(), expected.decode())


def test_it_is_gptq_on_the_curvature(weight: Tensor, moments: Any, site: Any) -> None:
    inputs, curvature = moments(72, 1)[0], moments(72, 2)[0]
    known = SiteStatistics((replace(site(torch.ones(40), inputs).uses[0], attention=curvature),))
    found = encode("aptq:bits=3", weight, known)
    assert torch.equal(found.codes(), encode("gptq:bits=3", weight, site(torch.ones(40), curvature)).codes())


class Attend(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(WIDTH, HEADS * SIZE, bias=False) for _ in range(3))
        self.o = torch.nn.Linear(HEADS * SIZE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


def test_what_attention_returns_is_nearer_on_other_texts() -> None:
    """Ablation: the inputs' own second moment in place of the curvature (which is GPTQ) leaves more error behind it.

    Tokens come as marks, of which each text has its own and which heads look for, and as noise between them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attend().requires_grad_(False)
        module.q.weight.mul_(2)
        mix = torch.randn(2, WIDTH, WIDTH) * torch.linspace(2, 0.05, WIDTH)[:, None]
        x = torch.randn(2, 200, 32, WIDTH)
        x = 0.2 * torch.where(torch.rand(2, 200, 32, 1) < 0.3, x @ mix[0], 0.5 * x @ mix[1])
    fit, held = x
    names = {name: name for name in ("q", "k", "v", "o")}
    batch = Batch(torch.zeros(fit.shape[:2], dtype=torch.int64), None)
    with torch.enable_grad(), watching_attention(True) as calls, observing(module, names) as observer:
        module(fit.clone().requires_grad_())
        sides = attention_curvature(calls, observer.seen, {n: module.get_submodule(n) for n in names}, batch)
    rows = fit.flatten(0, 1)
    h = rows.T @ rows / len(rows)
    with torch.no_grad():
        dense, errors = module(held), {}
        for name in ("q", "k", "v"):
            weight = module.get_submodule(name).weight.data
            for curvature in (sides[name] / len(rows), None):
                use = Use(torch.ones(len(weight)), h, h, torch.ones(WIDTH), 1.0, len(rows), attention=curvature)
                changed = encode("aptq:bits=3,group=16", weight, SiteStatistics((use,))).decode()
                module.get_submodule(name).weight.data = changed
                errors[name, curvature is None] = float((module(held) - dense).square().mean())
            module.get_submodule(name).weight.data = weight
    assert errors["k", False] < 0.9 * errors["k", True]
    aware, plain = (sum(errors[name, kind] for name in "qkv") for kind in (False, True))
    assert aware < plain
