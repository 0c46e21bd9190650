"""The search for chains of blocks: what actions do, that the shortest is found, and that kept states are right."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import layerwise
from layerwise.network.stack import Stack
from layerwise.probe.cola import Chain, Cola, Node, acted, actions, answered, drawn_chains, samples_of, searched

L = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_actions_skip_repeat_and_keep() -> None:
    root = Node(tuple(range(L)), 0)
    assert acted(root, (1, 1)).chain == (0, 1, 2, 3) and acted(root, (1, 1)).cursor == 1
    assert acted(root, (2, 0)).chain == (2, 3) and acted(root, (2, 0)).cursor == 0
    assert acted(root, (2, 3)).chain == (0, 1, 0, 1, 0, 1, 2, 3) and acted(root, (2, 3)).cursor == 6
    assert (4, 0) not in actions(root, L), "a chain is never empty"
    assert not actions(Node((0, 1), 2), L)


@pytest.mark.parametrize("goal", [(1, 3), (0, 2), (0, 1, 1, 3), (0, 1, 3), (3,)])
def test_it_finds_the_shortest_right_chain(goal: Chain) -> None:
    """Right is every chain that has the goal as a subsequence, so the goal itself is the shortest of all."""

    def right(chain: Chain) -> bool:
        left = iter(chain)
        return all(block in left for block in goal)

    every = (c for n in range(1, 6) for c in itertools.product(range(L), repeat=n))
    shortest = min(len(c) for c in every if right(c))
    found, root = searched(Cola(simulations=400), L, right, generator())
    assert found is not None and right(found) and len(found) == shortest
    assert root.visits == 400 and root.visits >= sum(child.visits for child in root.children.values())


def test_the_tree_is_shorter_than_drawn_chains_and_longer_without_the_price_of_length() -> None:
    def right(chain: Chain) -> bool:
        return 7 in chain and 2 in chain

    lengths: dict[str, list[int]] = {"search": [], "free": [], "drawn": []}
    for seed in range(8):
        for name, rule in (("search", Cola(simulations=60)), ("free", Cola(simulations=60, shorter=0.0))):
            best, _ = searched(rule, 12, right, generator(seed))
            lengths[name].append(len(best or range(12)))
        lengths["drawn"].append(len(drawn_chains(12, 60, right, generator(seed)) or range(12)))
    assert sum(lengths["search"]) < sum(lengths["drawn"]) and sum(lengths["search"]) < sum(lengths["free"])


def test_one_simulation_is_the_intact_network() -> None:
    chains: list[Chain] = []
    searched(Cola(simulations=1), L, lambda chain: bool(chains.append(chain)), generator())
    assert chains == [tuple(range(L))]


def test_kept_states_give_the_answers_of_plain_runs(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    network = layerwise.open(tiny_llama)
    calibration = layerwise.calibrate(network, str(sentences), work=tmp_path, sequences=48, length=32, threads=1)
    stack = Stack(network)
    with torch.inference_mode():
        (runner, (right, _)), *_ = samples_of(stack, calibration, Cola(samples=2))
        for chain in ((0, 1), (1, 0, 0), (0, 0, 1, 1), (1,), (0, 0, 1)):
            entered = stack.enter(runner.batch)
            hidden = entered.hidden
            for block in chain:
                hidden = stack.run(block, hidden, entered)
            assert torch.equal(hidden, runner.state(chain))
            assert runner.run(chain) == int(stack.leave(runner.batch, hidden).logits[0, -1].argmax())
        assert runner.computed == len({c[:n] for c in runner.states for n in range(1, len(c) + 1)})
        assert answered(runner, runner.run((0, 1)), (0, 1)) and right >= 0
        whole = stack.module(**runner.batch.arguments(), use_cache=False).logits[0, -1]
        assert runner.run((0, 1)) == int(whole.argmax())
    calibration.journal.close()
