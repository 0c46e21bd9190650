"""Tied blocks: what is shared and what each depth keeps, exactly, and what corrections and own norms are worth."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.factorize._tied import Tie, best_rank, chosen, shared_and_corrections, tied
from layerwise.factorize._uptrain import uptrained
from layerwise.loss import Loss
from layerwise.network.arranged import in_memory
from layerwise.network.network import Network, open_network
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_surgeon

TOKENS = torch.randint(5, 60, (12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(build: Any, causal_tokenizer: Any) -> Network:
    """A causal network of five blocks."""
    from tests.conftest import DECODER
    from transformers import LlamaConfig, LlamaForCausalLM

    path: Path = build(LlamaForCausalLM, LlamaConfig, causal_tokenizer, 31, **DECODER | {"num_hidden_layers": 5})
    return open_network(path)


def logits(network: Network) -> Tensor:
    with torch.inference_mode():
        found: Tensor = in_memory(network)(input_ids=TOKENS, use_cache=False).logits
    return found


def matrices(count: int, rows: int = 10, columns: int = 7) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(rows, columns, generator=draw, dtype=torch.float64) for _ in range(count)]


def left_over(weights: list[Tensor], tie: Tie) -> float:
    base, factors = shared_and_corrections(weights, None, tie)
    return sum(float((w - base - (b @ a).double()).square().sum()) for w, (b, a) in zip(weights, factors, strict=True))


def test_which_depth_runs_which_block() -> None:
    assert Tie(2).stored(6) == [0, 1, 2, 0, 1, 2] and Tie(2).stored(5) == [0, 1, 2, 0, 1]
    assert Tie(2, "row").stored(5) == [0, 0, 1, 1, 2] and Tie(5).stored(5) == [0] * 5
    stepwise, of = Tie(3, start="stepwise"), Tie(3).stored(9)
    assert [chosen(stepwise, of, j, [j, j + 3, j + 6]) for j in range(3)] == [0, 1, 2]  # blocks 0, 4 and 8
    with pytest.raises(InputError, match="1 to 5 times"):
        Tie(6).stored(5)


def test_a_correction_loses_the_dropped_singular_values_and_no_shared_matrix_beats_the_mean() -> None:
    weights = matrices(3)
    mean = torch.stack(weights).mean(0)
    for rank in (1, 3, 7):
        tails = sum(float((torch.linalg.svdvals(w - mean)[rank:] ** 2).sum()) for w in weights)
        assert left_over(weights, Tie(3, rank=rank)) == pytest.approx(tails, abs=1e-9, rel=1e-5)
    plain = left_over(weights, Tie(3))
    for other in matrices(5):
        assert sum(float((w - mean - 0.1 * other).square().sum()) for w in weights) > plain


def test_refits_never_leave_more_and_help() -> None:
    """With corrections the mean is not the best shared matrix."""
    losses = [left_over(matrices(3), Tie(3, rank=2, refits=n)) for n in (0, 1, 5, 50)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_corrections_of_full_rank_give_the_network_back(network: Network) -> None:
    expected = logits(network)
    for pattern in ("cycle", "row"):
        made = tied(network, Tie(2, pattern, rank=10_000))
        torch.testing.assert_close(logits(made), expected, rtol=1e-3, atol=1e-4)
    assert tied(network, Tie(1)) is network


def test_tied_outright_is_the_network_with_equal_matrices(network: Network) -> None:
    """Against the dense class with every depth's matrices set to the mean of its group, and norms as they were."""
    module = in_memory(network)
    of = Tie(2).stored(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                level = int(name.split(".layers.")[1].split(".")[0])
                group = [i for i, stored in enumerate(of) if stored == of[level]]
                names = [name.replace(f".layers.{level}.", f".layers.{i}.") for i in group]
                parameter.copy_(torch.stack([network.read(n) for n in names]).mean(0))
        expected = module(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(tied(network, Tie(2))), expected, rtol=1e-4, atol=1e-5)


def test_what_is_stored_is_the_blocks_and_the_corrections(network: Network) -> None:
    block = sum(p.numel() for n, p in network.module.named_parameters() if ".layers.0." in n)
    norms = sum(p.numel() for n, p in network.module.named_parameters() if ".layers.0." in n and p.dim() == 1)
    sides = sum(s.rows + s.columns for s in network.tree.sites if s.block == network.tree.blocks[0])
    made = tied(network, Tie(2, rank=3))
    held = sum(p.numel() for p in made.module.parameters())
    # three stored blocks, norms of the two depths that come later, corrections of the four depths that share
    assert held == sum(p.numel() for p in network.module.parameters()) - 2 * block + 2 * norms + 4 * 3 * sides


def test_more_rank_is_nearer_to_the_network_than_less(network: Network) -> None:
    """Ablation: no corrections, and shared norms."""
    expected = logits(network)
    small = [(n, p.shape) for n, p in network.module.named_parameters() if ".layers." in n and p.dim() == 1]
    draws = [torch.Generator().manual_seed(i) for i in range(len(small))]
    noisy = {n: torch.rand(shape, generator=draw) + 0.5 for (n, shape), draw in zip(small, draws, strict=True)}
    own = replace(network, given=noisy)
    errors = [float((logits(tied(network, Tie(2, rank=r))) - expected).square().mean()) for r in (0, 8, 16)]
    assert errors[2] < errors[1] < errors[0]
    spread = logits(own)
    kept, shared = (float((logits(tied(own, Tie(2, rank=40, own=k))) - spread).square().mean()) for k in (True, False))
    assert kept < 0.8 * shared


def test_distillation_lowers_the_loss_and_starts_better_from_the_residual(network: Network) -> None:
    """Ablation: corrections that start at nothing, trained as long on the same sequences."""
    loss, batch = Loss("token kl"), Batch(TOKENS, None)
    expected = loss.target(type("O", (), {"logits": logits(network)}), batch)

    def measured(made: Network) -> float:
        found = loss.target(type("O", (), {"logits": logits(made)}), batch)
        return float(loss.distances(expected, found).mean())

    losses = {}
    for residual in (True, False):
        made = tied(network, Tie(2, rank=8, residual=residual))
        after = uptrained(made, network, loss, [batch], 12, 3e-3, 0)
        losses[residual] = measured(made), measured(after)
        assert losses[residual][1] < losses[residual][0]
    assert losses[True][0] < losses[False][0] and losses[True][1] < losses[False][1]


def test_private_projections_are_of_the_last_matrix_alone(network: Network) -> None:
    made = tied(network, Tie(2, "row", rank=4, last=True))
    assert made.arrangement is not None
    corrected = {path for extras in made.arrangement.extras.values() for path in extras.corrections}
    assert len(corrected) == 1 and made.arrangement.blocks == 3 and made.arrangement.uses == 5
    left, right = best_rank(matrices(1)[0], 7)
    torch.testing.assert_close(left @ right, matrices(1)[0])


@pytest.mark.parametrize("text", ["relaxed_recursive:loops=9", "sret:loops=6", "widenet:blocks=9"])
def test_what_cannot_be_tied_is_refused(text: str, network: Network) -> None:
    surgeon: Any = parse_surgeon(text)
    with pytest.raises(InputError):
        surgeon.operate(network, type("C", (), {"splits": None})(), None)
