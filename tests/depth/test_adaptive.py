"""Blocks that run for some tokens or texts only: the algebra of the rules, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.acts.apply import write_network
from layerwise.acts.kept import Rebuilt
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import Splits, pad_texts
from layerwise.depth.eco_m2f import EcoM2f, best_depths, train_gate
from layerwise.depth.gamma_mod import GammaMod, above, attention_ranks, map_rank
from layerwise.depth.palbert import Palbert, divergence, spread
from layerwise.engine.journal import Journal
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.loss import Loss
from layerwise.network import adaptive
from layerwise.network.adaptive import adapted, best, running_of
from layerwise.network.arranged import in_memory
from layerwise.network.depths import Depths, parse_depths
from layerwise.network.load import load
from layerwise.network.network import Network, open_network

GEN = torch.Generator().manual_seed(11)
TOKENS = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Network:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return made_of(LlamaForCausalLM, config, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Network:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return made_of(BertForSequenceClassification, config, tmp_path_factory.mktemp("encoder"))


def made_of(cls: Any, config: Any, folder: Path) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cls(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    module.save_pretrained(folder)
    return open_network(folder)


def routed(network: Network, blocks: tuple[int, ...], bias: float = 0.0, threshold: float = 0.5) -> Network:
    values: dict[str, Tensor] = {}
    for block in blocks:
        values[f"{network.tree.blocks[block]}.depth.weight"] = torch.randn(32, generator=GEN)
        values[f"{network.tree.blocks[block]}.depth.bias"] = torch.full((1,), bias)
    return adapted(network, Depths("tokens", blocks, threshold), values)


def headed(network: Network, depths: Depths, bias: float = 0.0, seed: int = 4) -> Network:
    read, said = (64, 1) if depths.rule == "exit" else (32, 4)
    place = f"{network.tree.blocks[0]}.depth"
    generator = torch.Generator().manual_seed(seed)
    values = {
        f"{place}.inner.weight": 2 * torch.randn(depths.inner, read, generator=generator),
        f"{place}.inner.bias": torch.zeros(depths.inner),
        f"{place}.outer.weight": 3 * torch.randn(said, depths.inner, generator=generator),
        f"{place}.outer.bias": torch.full((said,), bias),
    }
    return adapted(network, depths, values)


@torch.no_grad()
def logits(module: Any, tokens: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    return module(input_ids=tokens, attention_mask=mask, use_cache=False, **given).logits


# ---------------------------------------------------------------- tokens


def test_a_router_that_lets_all_in_is_the_network_and_one_that_lets_none_in_skips_the_block(decoder: Network) -> None:
    plain = in_memory(decoder)
    assert torch.equal(logits(in_memory(routed(decoder, (1, 3), 1e4)), TOKENS), logits(plain, TOKENS))
    shorter: Any = copy.deepcopy(plain)
    shorter.model.layers = nn.ModuleList([plain.model.layers[0], plain.model.layers[2]])  # type: ignore[union-attr, index]
    shorter.config.num_hidden_layers = 2
    torch.testing.assert_close(logits(in_memory(routed(decoder, (1, 3), -1e4)), TOKENS), logits(shorter, TOKENS))


def test_chosen_tokens_are_a_sequence_of_their_own(decoder: Network) -> None:
    """Against the block run on everything with the keys of tokens that pass by masked out."""
    network = routed(decoder, (2,))
    module: Any = in_memory(network)
    found = logits(module, TOKENS)
    chosen: list[Tensor] = []
    block = module.model.layers[2]

    def by_hand(hidden: Tensor, **given: Any) -> Tensor:
        scores = adaptive.routed_scores(hidden, block.depth.weight, block.depth.bias)
        chosen.append(scores.sigmoid() > 0.5)
        seen = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & chosen[0][:, None, None, :]
        seen = seen | torch.eye(12, dtype=torch.bool)
        new = type(block).__mro__[1].forward(block, hidden, **{**given, "attention_mask": seen})
        return torch.where(chosen[0][..., None], torch.lerp(hidden, new, scores.sigmoid()[..., None]), hidden)

    block.forward = by_hand
    torch.testing.assert_close(found, logits(module, TOKENS), rtol=1e-4, atol=1e-5)
    assert 0 < int(chosen[0].sum()) < chosen[0].numel()


def test_rows_do_not_know_of_each_other_and_a_cache_changes_nothing(decoder: Network) -> None:
    module: Any = in_memory(routed(decoder, (1, 3)))
    together = logits(module, TOKENS)
    ran = running_of(module).ran  # type: ignore[union-attr]
    assert ran[0] == ran[2] == 36 and 0 < ran[1] < 36
    alone = torch.cat([logits(module, TOKENS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        first = module(TOKENS[:1, :6], use_cache=True)
        past, parts = first.past_key_values, [first.logits]
        for start, stop in ((6, 9), (9, 10), (10, 11), (11, 12)):
            parts.append(module(TOKENS[:1, start:stop], past_key_values=past, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), together[:1], rtol=1e-4, atol=1e-5)
        assert past.get_seq_length(1) < past.get_seq_length(0) == 12, "a token that passes by leaves no keys behind"
        with pytest.raises(InputError, match="one text at a time"):
            module(TOKENS, use_cache=True)


def test_later_tokens_change_nothing_before_them(decoder: Network) -> None:
    module = in_memory(routed(decoder, (1, 3)))
    other = TOKENS.clone()
    other[:, 8:] = 7
    torch.testing.assert_close(logits(module, other)[:, :8], logits(module, TOKENS)[:, :8], rtol=1e-4, atol=1e-5)


def test_a_share_takes_the_best_and_the_protected() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0, -9.0, -9.0]])
    assert best(scores, 0.5, 2).tolist() == [[True, False, True, False, True, True]]
    assert not best(scores, 0.0, 0).any() and best(scores, 1.0, 0).all() and best(scores, 0.0, 99).all()


def test_rank_of_attention_maps() -> None:
    even, own = torch.full((1, 6, 6), 1 / 6), torch.eye(6)[None]
    assert map_rank(even) == 1 and map_rank(own) == 6 and map_rank(torch.cat([even, own])) == 3.5


def test_a_threshold_lets_a_share_in() -> None:
    values = torch.rand(101, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 1.0):
        assert int((values > above(values, share)).sum()) == round(share * 101)


# ---------------------------------------------------------------- texts

PADDED = pad_texts([list(range(5, 17)), list(range(20, 26)), list(range(30, 39)), list(range(40, 49))], 0)


def test_a_text_that_never_leaves_is_the_network(encoder: Network) -> None:
    own = logits(in_memory(encoder), PADDED.tokens, PADDED.mask)
    whole = in_memory(headed(encoder, Depths("exit", threshold=1.0, inner=8), -1.0))
    assert torch.equal(logits(whole, PADDED.tokens, PADDED.mask), own)
    early = in_memory(headed(encoder, Depths("exit", threshold=0.0, inner=8)))
    logits(early, PADDED.tokens, PADDED.mask)
    assert running_of(early).ran.tolist() == [1, 1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("depths", [Depths("exit", threshold=0.6, inner=8), Depths("gate", inner=8)])
def test_texts_leave_alone(depths: Depths, encoder: Network) -> None:
    """A batch of different depths is each text alone, and each is the network cut off there."""
    module = in_memory(headed(encoder, depths, -1.0, 8 if depths.rule == "exit" else 6))
    running = running_of(module)
    assert running is not None
    found = logits(module, PADDED.tokens, PADDED.mask)
    ran = running.ran.tolist()
    assert len(set(ran)) > 1, "the test wants texts of different depths"
    plain: Any = in_memory(encoder)
    for row, depth in enumerate(ran):
        one = PADDED.tokens[row : row + 1, : int(PADDED.counted[row].sum())]
        torch.testing.assert_close(found[row : row + 1], logits(module, one), rtol=1e-4, atol=1e-5)
        assert running.ran.tolist() == [depth]
        cut: Any = copy.deepcopy(plain)
        cut.bert.encoder.layer = cut.bert.encoder.layer[:depth]
        torch.testing.assert_close(found[row : row + 1], logits(cut, one), rtol=1e-4, atol=1e-5)


def test_exits_add_up_and_the_prior_costs_nothing_against_itself() -> None:
    chances = [torch.rand(5, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    p = spread(chances)
    torch.testing.assert_close(p.sum(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
    alike = spread([torch.full((2,), 0.3, dtype=torch.float64)] * 4)
    torch.testing.assert_close(divergence(alike, 0.3), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((divergence(p, 0.3) > 0).all())


def test_best_depths() -> None:
    apart = torch.rand(5, 200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(best_depths(apart, 0.0), apart.argmin(0)) and not best_depths(apart, 1e6).any()
    means = [float(best_depths(apart, beta).double().mean()) for beta in (0, 0.01, 0.05, 0.2, 1)]
    assert means == sorted(means, reverse=True)
    assert best_depths(torch.zeros(4, 2), 0.0).tolist() == [0, 0], "the fewest at a tie"


def test_a_gate_learns_depths_and_shuffled_ones_cannot_be_learned() -> None:
    from layerwise.depth._exits import new_head

    generator = torch.Generator().manual_seed(2)
    read = torch.randn(400, 16, generator=generator)
    wanted = (read[:, 0] > 0).long() * 2 + (read[:, 1] > 0).long()
    rates = []
    for targets in (wanted, wanted[torch.randperm(400, generator=generator)]):
        gate = new_head(16, 32, 4, 0)
        train_gate(gate, read[:300], targets[:300])
        rates.append(float((adaptive.said(gate, read[300:]).argmax(-1) == wanted[300:]).float().mean()))
    assert rates[0] > 0.8 > 0.5 > rates[1]


# ---------------------------------------------------------------- surgeons


def calibration_of(network: Network, kind: Any, folder: Path) -> Calibration:
    batches = [
        pad_texts([torch.randint(5, 60, (8 + i % 3,), generator=GEN).tolist() for i in range(16)], 0) for _ in range(4)
    ]
    if kind == "token kl":
        batches = [type(b)(b.tokens[:, :8], None) for b in batches]
    return Calibration(network, Loss(kind), Splits(tuple(batches[:2]), tuple(batches[2:]), ()), Journal(folder, "x"), 0)


@pytest.mark.parametrize("surgeon", [Palbert(steps=4), EcoM2f(steps=4), EcoM2f(steps=2, beta=1e6)])
def test_adaptive_texts_are_saved_and_loaded(surgeon: Any, encoder: Network, tmp_path: Path) -> None:
    calibration = calibration_of(encoder, "example kl", tmp_path / "work")
    made = surgeon.operate(encoder, calibration, Stopwatch())
    calibration.journal.close()
    write_network(Rebuilt(made, {}, {}, {}), tmp_path / "out")
    module = load(str(tmp_path / "out"), dtype=torch.float32)
    again = open_network(tmp_path / "out")
    assert again.depths == made.depths and again.depths is not None and again.depths.of_texts
    expected = logits(in_memory(again), PADDED.tokens, PADDED.mask)
    torch.testing.assert_close(logits(module, PADDED.tokens, PADDED.mask), expected, rtol=1e-4, atol=1e-5)
    if isinstance(surgeon, EcoM2f) and surgeon.beta > 1:
        assert running_of(module).ran.tolist() == [1, 1, 1, 1]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="in a way of its own already"):
        surgeon_again = adapted(again, Depths("gate", inner=8), {})
        del surgeon_again


def test_training_exits_brings_them_nearer(encoder: Network, tmp_path: Path) -> None:
    from layerwise.depth._exits import Exits

    calibration = calibration_of(encoder, "example kl", tmp_path / "work")
    exits = Exits("test", encoder, calibration, 8)

    def loss(part: Any, states: list[Tensor]) -> Tensor:
        return exits.distances(part, states).mean()

    with torch.no_grad():
        before = sum(float(loss(part, exits.states(part))) for part in exits.judge)
        last = exits.distances(exits.judge[0], exits.states(exits.judge[0]))[-1]
    assert float(last.abs().max()) < 1e-6, "the last exit is the network"
    exits.train(loss, None, 12, 1e-3, 0, lambda: None)
    calibration.journal.close()
    with torch.no_grad():
        assert sum(float(loss(part, exits.states(part))) for part in exits.judge) < 0.9 * before


def test_gamma_mod_converts_the_lowest_ranks(decoder: Network, tmp_path: Path) -> None:
    calibration = calibration_of(decoder, "token kl", tmp_path / "work")
    ranks = attention_ranks(in_memory(decoder), decoder.tree.blocks, calibration.splits.fit)
    assert len(ranks) == 4 and all(1 <= rank <= 8 for rank in ranks)
    surgeon = GammaMod(count=2, steps=3)
    made = surgeon.operate(decoder, calibration, Stopwatch())
    assert made.depths is not None and made.depths.blocks == surgeon.chosen(ranks)
    assert surgeon.chosen([9, 3, 1, 2]) == (2, 3) and GammaMod(count=1, choose="highest").chosen([9, 3, 1, 2]) == (1,)
    with pytest.raises(InputError, match="needs more blocks"):
        GammaMod(count=4).operate(decoder, calibration, Stopwatch())
    with pytest.raises(InputError, match="a depth of its own"):
        Palbert().operate(decoder, calibration, Stopwatch())
    calibration.journal.close()


def test_every_token_let_in_and_no_training_is_nearly_the_network(decoder: Network, tmp_path: Path) -> None:
    calibration = calibration_of(decoder, "token kl", tmp_path / "work")
    made = GammaMod(share=1.0, steps=0).operate(decoder, calibration, Stopwatch())
    calibration.journal.close()
    module = in_memory(made)
    logits(module, TOKENS)
    assert bool((running_of(module).ran == 36).all())  # type: ignore[union-attr]


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "value",
    [
        {"rule": "tokens", "blocks": [], "threshold": 0.5},
        {"rule": "tokens", "blocks": [2, 1], "threshold": 0.5},
        {"rule": "tokens", "blocks": [True], "threshold": 0.5},
        {"rule": "tokens", "blocks": [1], "threshold": float("nan")},
        {"rule": "tokens", "blocks": [1], "threshold": 1},
        {"rule": "exit", "threshold": 0.5, "inner": 0},
        {"rule": "exit", "threshold": 0.5, "inner": 1 << 40},
        {"rule": "exit", "threshold": 0.5, "inner": 8, "blocks": [1]},
        {"rule": "gate"},
        {"rule": "depth"},
        {"rule": ["tokens"]},
        ["tokens"],
        None,
    ],
)
def test_damaged_depths_are_refused(value: object) -> None:
    with pytest.raises(InputError):
        parse_depths(value)


def test_depths_are_read_as_they_are_written(encoder: Network, tmp_path: Path) -> None:
    for depths in (Depths("tokens", (1, 3), 0.25), Depths("exit", threshold=0.5, inner=8), Depths("gate", inner=8)):
        assert parse_depths(json.loads(json.dumps(depths.written()))) == depths
    with pytest.raises(InputError, match="tokens can pass by blocks 1 to 3"):
        adapted(encoder, Depths("tokens", (4,), 0.5), {})
    config = json.loads((encoder.checkpoint.directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "layerwise", "format_version": 3, "sites": {}, "depths": {}}
    folder = tmp_path / "old"
    folder.mkdir()
    for file in encoder.checkpoint.directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="format version 3"):
        open_network(folder)
