"""The laws that every rewrite obeys, run over the registry: a new rewrite file is tested without naming it here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.errors import InputError
from layerwise.network.folds import BlockScope, find_folds
from layerwise.network.rotary_pairs import find_rotary_pairs
from layerwise.network.sites import find_sites
from layerwise.network.skeleton import materialised
from layerwise.roles import Rewrite
from layerwise.technique import find, names

REWRITES = names(Rewrite)
FOLDING = ("tiny_llama", "tiny_qwen2", "tiny_mistral", "tiny_gpt2")
TOLERANCE = 1e-4


class Case:
    """The first block of a network with the network's own call, and statistics with a few large inputs."""

    def __init__(self, path: Path) -> None:
        import transformers

        model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
        tree = find_sites(model)
        self.path = tree.blocks[0]
        self.block = model.get_submodule(self.path)
        self.block.register_forward_pre_hook(self._note, with_kwargs=True)
        tokens = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        self.block._forward_pre_hooks.clear()
        self.linears = {s.name.removeprefix(f"{self.path}."): s for s in tree.of_block(self.path)}

    def _note(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.args, self.kwargs = args, kwargs

    def run(self, block: nn.Module) -> Tensor:
        with torch.no_grad():
            out = block(*self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def scope(self, dead: bool = False) -> BlockScope:
        fit = {}
        for i, (path, site) in enumerate(self.linears.items()):
            x = torch.randn(100, site.columns, generator=torch.Generator().manual_seed(i))
            x[:, ::11] *= 15
            if dead:
                x[:, ::5] = 0
            moment = x.T @ x / len(x)
            fit[path] = SiteStatistics((Use(torch.ones(site.rows), moment, moment, x.abs().mean(0), 1.0, 100),))
        return BlockScope(
            self.path,
            {n: p.data for n, p in self.block.named_parameters()},
            frozenset(p for p, s in self.linears.items() if s.transposed),
            fit,
            dict(fit),
            find_folds(self.block, self.run, self.args[0], seed=0),  # type: ignore[arg-type]
            find_rotary_pairs(self.block, self.run, self.args[0], seed=0, tolerance=TOLERANCE),  # type: ignore[arg-type]
        )


@pytest.fixture(params=REWRITES)
def rewrite(request: pytest.FixtureRequest) -> Iterator[Rewrite]:
    made = find(request.param)()
    assert isinstance(made, Rewrite)
    yield made


@pytest.fixture(params=FOLDING)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.getfixturevalue(request.param))


def rewritten(rewrite: Rewrite, scope: BlockScope) -> BlockScope:
    """The scope rewritten; skips a block in which the rewrite says that it finds no place."""
    try:
        return rewrite.rewrite(scope)
    except InputError as reason:
        assert str(reason).startswith(f"{rewrite.name} finds no") and scope.path in str(reason)
        pytest.skip(str(reason))


def test_there_is_a_rewrite() -> None:
    assert {"awq", "equalize", "repquant"} <= set(REWRITES)


def test_every_rewrite_finds_a_place_somewhere(rewrite: Rewrite, tiny_llama: Path) -> None:
    rewrite.rewrite(Case(tiny_llama).scope())


def test_the_function_is_kept(rewrite: Rewrite, case: Case) -> None:
    before = case.scope()
    after = rewritten(rewrite, before)
    assert any(not torch.equal(after.parameters[n], v) for n, v in before.parameters.items()), "nothing was rewritten"
    reference = case.run(case.block)
    with materialised(case.block, after.parameters) as block:
        found = case.run(block)
    change = float((reference - case.args[0]).norm())  # type: ignore[operator]
    assert float((found - reference).norm()) <= TOLERANCE * change


def test_shapes_and_names_stay(rewrite: Rewrite, case: Case) -> None:
    before = case.scope()
    after = rewritten(rewrite, before)
    assert {n: v.shape for n, v in after.parameters.items()} == {n: v.shape for n, v in before.parameters.items()}
    assert set(after.fit) == set(before.fit)
    assert set(after.judge) == set(before.judge)


def test_what_was_given_is_not_changed(rewrite: Rewrite, case: Case) -> None:
    before = case.scope()
    copies = {n: v.clone() for n, v in before.parameters.items()}
    rewritten(rewrite, before)
    assert all(torch.equal(before.parameters[n], v) for n, v in copies.items())


def test_twice_is_the_same(rewrite: Rewrite, case: Case) -> None:
    first, second = rewritten(rewrite, case.scope()), rewritten(rewrite, case.scope())
    assert all(torch.equal(v, second.parameters[n]) for n, v in first.parameters.items())


def test_dead_inputs_are_survived(rewrite: Rewrite, case: Case) -> None:
    after = rewritten(rewrite, case.scope(dead=True))
    assert all(bool(torch.isfinite(v).all()) for v in after.parameters.values())


def test_a_block_without_a_place_is_refused_by_name(rewrite: Rewrite, tiny_bert: Path) -> None:
    scope = replace(Case(tiny_bert).scope(), folds=())
    with pytest.raises(InputError, match=rf"{rewrite.name}.*{scope.path}"):
        rewrite.rewrite(scope)


def test_a_norm_on_the_residual_path_is_left_alone(rewrite: Rewrite, tiny_bert: Path) -> None:
    """A post-norm block reads its norms on the residual path too; only values fold, through attention's average."""
    scope = Case(tiny_bert).scope()
    after = rewritten(rewrite, scope)
    assert all(torch.equal(v, scope.parameters[n]) for n, v in after.parameters.items() if "LayerNorm" in n)
