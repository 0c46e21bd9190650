"""The laws that every surgeon obeys, run over the registry: a new surgeon file is tested without naming it here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwise.network.network import Network, open_network
from layerwise.network.reblocked import reblocked
from layerwise.network.skeleton import materialised
from layerwise.roles import BlockMeasure, Surgeon
from layerwise.technique import find, names

SURGEONS = names(Surgeon)
MEASURES = tuple(BlockMeasure(damage, influence) for damage, influence in ((0.4, 0.3), (0.1, 0.5), (0.2, 0.1)))


@pytest.fixture(params=SURGEONS)
def surgeon(request: pytest.FixtureRequest) -> Surgeon:
    made = find(request.param)()
    assert isinstance(made, Surgeon)
    return made


def test_there_are_surgeons() -> None:
    assert "drop_block" in SURGEONS


def test_without_options_nothing_changes(surgeon: Surgeon) -> None:
    assert surgeon.order(MEASURES) == (0, 1, 2)


def test_the_order_names_blocks_and_is_the_same_each_time(surgeon: Surgeon) -> None:
    for count in range(1, 4):
        order = surgeon.order(MEASURES[:count])
        assert set(order) <= set(range(count)) and order == surgeon.order(MEASURES[:count])


def outputs(network: Network, tokens: torch.Tensor) -> torch.Tensor:
    """The network's last hidden state or logits, by its own forward."""
    values = {name: network.read(name) for name, _ in network.module.named_parameters(remove_duplicate=False)}
    with materialised(network.module, values) as module, torch.no_grad():
        return module(tokens)[0]  # type: ignore[no-any-return]


def test_the_network_itself_comes_back_unchanged(tiny_network: Path) -> None:
    network = open_network(str(tiny_network))
    assert reblocked(network, tuple(range(len(network.tree.blocks)))) is network


def test_config_names_and_weights_agree(tiny_network: Path) -> None:
    """The network of one block is the class's own network of one block with that block's weights."""
    network = open_network(str(tiny_network))
    last = len(network.tree.blocks) - 1
    small = reblocked(network, (last,))
    assert len(small.tree.blocks) == 1 and small.tree.parameters < network.tree.parameters
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    full = open_network(str(tiny_network))
    members = full.module.get_submodule(full.tree.blocks[0].rpartition(".")[0])
    values = {name: full.read(name) for name, _ in full.module.named_parameters(remove_duplicate=False)}
    with materialised(full.module, values) as module, torch.no_grad():
        kept = list(members.children())
        del members[:last]  # type: ignore[operator]
        for block in members.children():
            for part in block.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = 0
        full.module.config.num_hidden_layers = 1  # type: ignore[union-attr]
        expected = module(tokens, use_cache=False)[0]
        assert len(kept) == last + 1
    torch.testing.assert_close(outputs(small, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_repeated_block_reads_the_same_weights(tiny_llama: Path) -> None:
    network = reblocked(open_network(str(tiny_llama)), (1, 0, 1))
    first, last = network.tree.blocks[0], network.tree.blocks[2]
    for (name, a), b in zip(network.read_part(first).items(), network.read_part(last).values(), strict=True):
        assert torch.equal(a, b), name
