"""Sparse forms inside modules: products, look-ups, casts and copies go through what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.network.packed import PackedEmbedding, PackedLinear
from layerwise.recipe import parse_recipe

RECIPES = ["wanda", "magnitude:bits=3,group=8", "sparsegpt:pattern=2:4,bits=1", "sparsegpt:dtype=bfloat16"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_modules_multiply_and_look_up_from_the_sparse_form(recipe: str) -> None:
    weight = torch.randn(10, 22, generator=torch.Generator().manual_seed(3))
    form = parse_recipe(recipe).encoder.encode(weight, SiteStatistics.uninformed(10, 22))
    x, index = torch.randn(2, 3, 22, generator=torch.Generator().manual_seed(4)), torch.tensor([[9, 0], [0, 4]])
    linear = PackedLinear(form.spec(), form.tensors(), None, torch.float32)
    table = PackedEmbedding(form.spec(), form.tensors(), torch.float32)
    for module in (linear, copy.deepcopy(linear)):
        torch.testing.assert_close(module(x), x @ form.decode().T)
    assert torch.equal(table(index), form.decode()[index])
    halved = nn.Sequential(linear).half()
    for suffix, tensor in form.tensors().items():
        kept = linear.get_buffer("weight" + suffix)
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor)
    assert halved(x.half()).dtype == torch.float16
