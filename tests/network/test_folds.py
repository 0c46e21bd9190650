"""Folds: found by trying them on real blocks, exact where found, absent where a residual path or a nonlinearity is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.network.folds import BlockScope, Fold, find_folds, fold_parameters, scaled
from layerwise.sensitivity.kronecker import damage


@dataclass
class Probed:
    block: nn.Module
    run: Callable[[nn.Module], Tensor]
    hidden: Tensor

    @property
    def folds(self) -> dict[str, tuple[str, ...]]:
        return {f.producer: f.consumers for f in find_folds(self.block, self.run, self.hidden, seed=0)}


def probe(path: Path, block: str) -> Probed:
    """A block of a network with the very call that the network makes."""
    import transformers

    model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    member = model.get_submodule(block)
    caught: dict[str, Any] = {}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["args"], caught["kwargs"] = args, kwargs

    handle = member.register_forward_pre_hook(note, with_kwargs=True)
    tokens = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    handle.remove()

    def run(module: nn.Module) -> Tensor:
        with torch.no_grad():
            out = module(*caught["args"], **caught["kwargs"])
        return out[0] if isinstance(out, tuple) else out

    return Probed(member, run, caught["args"][0])


def test_llama_norms_feed_groups_and_up_feeds_down(tiny_llama: Path) -> None:
    assert probe(tiny_llama, "layers.0").folds == {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.up_proj": ("mlp.down_proj",),
    }  # v has fewer heads than o has columns: no fold there


def test_gpt2_folds_through_norms_only(tiny_gpt2: Path) -> None:
    assert probe(tiny_gpt2, "h.1").folds == {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}


def test_a_post_norm_block_folds_values_and_never_a_norm(tiny_bert: Path) -> None:
    assert probe(tiny_bert, "encoder.layer.0").folds == {
        "attention.self.value": ("attention.output.dense",),
    }


class Plain(nn.Module):
    """norm → fc1 → act → fc2, with or without the normed value on the residual path."""

    def __init__(self, act: nn.Module, post_norm: bool = False) -> None:
        super().__init__()
        self.norm, self.act, self.post_norm = nn.LayerNorm(16), act, post_norm
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return (normed if self.post_norm else hidden) + self.fc2(self.act(self.fc1(normed)))


def plain(act: nn.Module, post_norm: bool = False) -> Probed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        block = Plain(act, post_norm).eval()
    hidden = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(4))
    return Probed(block, lambda member: member(hidden), hidden)


@pytest.mark.parametrize(
    ("act", "post_norm", "expected"),
    [
        (nn.GELU(), False, {"norm": ("fc1",)}),
        (nn.ReLU(), False, {"norm": ("fc1",), "fc1": ("fc2",)}),  # a positive factor passes through
        (nn.GELU(), True, {}),
    ],
)
def test_what_lies_between_decides(act: nn.Module, post_norm: bool, expected: dict[str, tuple[str, ...]]) -> None:
    assert plain(act, post_norm).folds == expected


def test_probing_leaves_the_block_as_it_was() -> None:
    probed = plain(nn.ReLU())
    before = {n: v.clone() for n, v in probed.block.state_dict().items()}
    assert probed.folds
    assert all(torch.equal(v, before[n]) for n, v in probed.block.state_dict().items())
    assert not any(m._forward_hooks for m in probed.block.modules())


def test_folded_parameters_hold_for_transposed_linears() -> None:
    factor = torch.tensor([2.0, 4.0])
    parameters = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2), "b.weight": torch.ones(2, 5)}
    out = fold_parameters(parameters, frozenset({"a", "b"}), Fold("a", ("b",)), factor)
    assert torch.equal(out["a.weight"], torch.tensor([[0.5, 0.25]] * 3))
    assert torch.equal(out["a.bias"], torch.tensor([0.5, 0.25]))
    assert torch.equal(out["b.weight"], torch.tensor([[2.0] * 5, [4.0] * 5]))


def moment(size: int, seed: int) -> Tensor:
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


@pytest.mark.parametrize("whole", [True, False])
def test_the_same_change_has_the_same_damage_in_scaled_coordinates(whole: bool) -> None:
    rows, columns = moment(5, 1), moment(7, 2)
    if not whole:
        rows, columns = rows.diagonal().clone(), columns.diagonal().clone()
    uses = (Use(rows, columns, columns, torch.ones(7), scale, 10) for scale in (0.3, 0.1))
    site = SiteStatistics(tuple(uses))
    change = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    s, t = torch.rand(7) + 0.5, torch.rand(5) + 0.5
    moved = scaled(site, rows=t, columns=1 / s)
    assert damage(change * s / t[:, None], moved) == pytest.approx(damage(change, site), rel=1e-4)
    assert torch.allclose(moved.absolute_mean, 1 / s)


def test_a_scope_folds_its_statistics_along() -> None:
    use = Use(moment(4, 1), moment(4, 2), moment(4, 2), torch.ones(4), 1.0, 10)
    statistics = {"v": SiteStatistics((use,)), "o": SiteStatistics((use,))}
    parameters = {"v.weight": torch.randn(4, 4), "o.weight": torch.randn(4, 4)}
    scope = BlockScope("b", parameters, frozenset(), statistics, dict(statistics), (Fold("v", ("o",)),))
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0])
    folded = scope.folded(scope.folds[0], factor)
    product = scope.weight("o") @ scope.weight("v")
    assert torch.allclose(folded.weight("o") @ folded.weight("v"), product, atol=1e-6)
    for before, after in ((scope.fit, folded.fit), (scope.judge, folded.judge)):
        for name in ("v", "o"):
            whole = damage(scope.weight(name), before[name])
            assert damage(folded.weight(name), after[name]) == pytest.approx(whole, rel=1e-4)
