"""The laws that every rewrite of a whole network obeys, run over the registry: a new file is tested without naming it.

The same function on accepted architectures, others refused by name, twice is once, and what was given stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.normalize.modules import error, gpt2, neox, outputs, state, vit_classifier
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.network import Network, open_network
from layerwise.network.streaming import Batch, Streamer
from layerwise.recipe import parse_technique
from layerwise.roles import NetworkRewrite
from layerwise.technique import find, names

REWRITES = names(NetworkRewrite)
MODULES = {"gpt2": gpt2, "vit": vit_classifier, "neox": neox}
REFUSED = {"tiny_bert": "post-norm", "tiny_bert_classifier": "post-norm"}
ANY = ("tiny_llama", "tiny_qwen2", "tiny_mistral", "tiny_mixtral", "tiny_qwen3_moe", "tiny_qwen2_moe")
EXACT = 1e-5


def settings() -> list[str]:
    """Every rewrite, with every choice that one of its options offers."""
    found: list[str] = []
    for name in REWRITES:
        found.append(name)
        for field in dataclasses.fields(find(name)):  # type: ignore[arg-type]
            found += [f"{name}:{field.name}={c}" for c in field.metadata["choices"] or () if c != field.default]
    return found


@pytest.fixture(params=settings())
def rewrite(request: pytest.FixtureRequest) -> NetworkRewrite:
    made = parse_technique(request.param)
    assert isinstance(made, NetworkRewrite)
    return made


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def rewritten(rewrite: NetworkRewrite, path: Path) -> Network:
    """The checkpoint rewritten; skips a rewrite that says it only works in memory."""
    network = open_network(path)
    try:
        return rewrite.rewrite(network)
    except InputError as reason:
        assert "in memory" in str(reason) and network.architecture in str(reason)
        pytest.skip(str(reason))


def streamed(network: Network) -> Tensor:
    """The network's output with one block at a time in memory."""
    tokens = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    batch, streamer = Batch(tokens, None), Streamer(network)
    with torch.inference_mode():
        for index in range(len(network.tree.blocks)):
            with streamer.head_of_network() as enter:
                first, call = enter(batch, index)
            hidden = first if index == 0 else hidden  # noqa: F821
            with streamer.block(index) as block:
                hidden = streamer.run_block(block, hidden, call)
        with streamer.tail() as leave:
            found: Any = leave(batch, hidden)
    return found.logits


def test_there_are_rewrites() -> None:
    assert {"pre_rmsnorm", "pre_crmsnorm"} <= set(REWRITES)


# ---------------------------------------------------------------- modules in memory


def test_a_converted_module_is_the_same_function(rewrite: NetworkRewrite, module: nn.Module) -> None:
    converted = rewrite.convert(module)
    assert type(converted) is type(module)
    assert any(p.shape != q.shape or not torch.equal(p, q) for p, q in pairs(module, converted)), "nothing changed"
    assert error(outputs(converted), outputs(module)) < EXACT


def test_the_given_module_stays_as_it_is(rewrite: NetworkRewrite, module: nn.Module) -> None:
    before, kinds = state(module), [type(m) for m in module.modules()]
    rewrite.convert(module)
    after = state(module)
    assert list(after) == list(before) and all(torch.equal(after[n], v) for n, v in before.items())
    assert [type(m) for m in module.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_converting_twice_is_converting_once(rewrite: NetworkRewrite, module: nn.Module) -> None:
    once = rewrite.convert(module)
    twice = rewrite.convert(once)
    assert all(torch.equal(p, q) for p, q in pairs(once, twice))
    assert torch.equal(outputs(once), outputs(twice))


def test_the_same_module_gives_the_same_bytes(rewrite: NetworkRewrite, module: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in pairs(rewrite.convert(module), rewrite.convert(module)))


def pairs(one: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    found = dict(other.named_parameters())
    return [(p, found[n]) for n, p in one.named_parameters() if n in found]


# ---------------------------------------------------------------- checkpoints


def test_a_rewritten_network_streams_the_same_function(rewrite: NetworkRewrite, tiny_gpt2: Path) -> None:
    after = rewritten(rewrite, tiny_gpt2)
    assert error(streamed(after), streamed(open_network(tiny_gpt2))) < EXACT


def test_the_given_network_stays_as_it_is(rewrite: NetworkRewrite, tiny_gpt2: Path) -> None:
    network = open_network(tiny_gpt2)
    config = dict(network.checkpoint.config)
    before = streamed(network)
    with contextlib.suppress(InputError):
        rewrite.rewrite(network)
    assert network.checkpoint.config == config and not network.changes
    assert torch.equal(streamed(network), before)
    assert all(p.is_meta for p in network.module.parameters())


def test_rewriting_twice_is_rewriting_once(rewrite: NetworkRewrite, tiny_gpt2: Path) -> None:
    once = rewritten(rewrite, tiny_gpt2)
    twice = rewrite.rewrite(once)
    assert twice.checkpoint.config == once.checkpoint.config
    for name, _ in once.module.named_parameters():
        assert torch.allclose(twice.read(name), once.read(name), rtol=0, atol=1e-7)


def test_a_rewritten_network_can_be_had_again(rewrite: NetworkRewrite, tiny_gpt2: Path) -> None:
    network = rewritten(rewrite, tiny_gpt2)
    assert torch.equal(streamed(network.again()), streamed(network))


@pytest.mark.parametrize("name", ANY)
def test_a_network_is_refused_by_name_or_kept_the_same_function(
    rewrite: NetworkRewrite, name: str, request: pytest.FixtureRequest
) -> None:
    network = open_network(request.getfixturevalue(name))
    try:
        after = rewrite.rewrite(network)
    except InputError as reason:
        assert str(reason).startswith(f"{rewrite.name} refuses {network.architecture}: ")
        return
    assert after.changes
    assert error(streamed(after), streamed(network)) < EXACT


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(rewrite: NetworkRewrite, name: str, request: pytest.FixtureRequest) -> None:
    from layerwise.network.load import load

    path = request.getfixturevalue(name)
    network = open_network(path)
    wanted = rf"{rewrite.name} refuses {network.architecture}: .*{REFUSED[name]}"
    with pytest.raises(InputError, match=wanted):
        rewrite.rewrite(network)
    with pytest.raises(InputError, match=wanted):
        rewrite.convert(load(path))
