"""Comparing networks: the streamed figures are those of whole networks held side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.evaluate.compare import compare
from layerwise.evaluate.latency import forward_seconds, open_for_time
from layerwise.evaluate.sentences import pair_batches, spearman
from layerwise.evaluate.sites import measure_sites, single_site_changes
from layerwise.loss import Loss, loss_of
from layerwise.network.network import Network, open_network
from layerwise.network.overlay import Overlay
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_recipe


def full_batches() -> tuple[Batch, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(Batch(torch.randint(5, 90, (3, 16), generator=draw), None) for _ in range(2))


def padded_batches() -> tuple[Batch, ...]:
    mask = torch.tensor([[1] * 9 + [0] * 7, [1] * 16, [1] * 4 + [0] * 12])
    return tuple(Batch(b.tokens * mask, mask) for b in full_batches())


def rounded(network: Network, recipe: str = "rtn:bits=3,group=16") -> dict[str, Encoded]:
    """Every searched site by one recipe."""
    encoder = parse_recipe(recipe).encoder
    return {
        s.name: encoder.encode(network.read_site(s), SiteStatistics.uninformed(s.rows, s.columns))
        for s in network.tree.sites
        if s.searched
    }


def changed(network: Network, encoded: dict[str, Encoded]) -> Overlay:
    return Overlay(network, {name: (lambda e=e: e) for name, e in encoded.items()}, exact=True)  # type: ignore[misc]


def whole(path: Path, network: Network, encoded: dict[str, Encoded]) -> Any:
    """The network of transformers' own class with the decoded weights in it."""
    import transformers

    module = getattr(transformers, network.architecture).from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, form in encoded.items():
            weight = form.decode()
            module.get_parameter(f"{name}.weight").copy_(weight.T if network.tree.find(name).transposed else weight)
    return module


@torch.inference_mode()
def targets(module: Any, loss: Loss, batches: tuple[Batch, ...]) -> Tensor:
    return torch.cat([loss.target(module(**b.arguments()), b) for b in batches])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_loss_is_that_of_whole_networks(tiny_network: Path, tmp_path: Path, padded: bool) -> None:
    network, batches = open_network(tiny_network), padded_batches() if padded else full_batches()
    loss, encoded = loss_of(network.architecture, tiny_network), rounded(open_network(tiny_network))
    dense = targets(whole(tiny_network, network, {}), loss, batches)
    other = targets(whole(tiny_network, network, encoded), loss, batches)
    wanted = float(loss.distances(dense, other).mean())
    found = compare(network, {"rounded": changed(network, encoded)}, loss, batches, tmp_path)
    assert found["rounded"].metrics[loss.name] == pytest.approx(wanted, rel=1e-3) and wanted > 1e-4
    assert found["dense"].metrics[loss.name] == 0
    assert found["rounded"].terms == len(dense)
    assert not list(tmp_path.iterdir())  # hidden states are removed again


def test_perplexity_is_of_the_next_token(tiny_llama: Path, tmp_path: Path) -> None:
    network, batches = open_network(tiny_llama), full_batches()
    found = compare(network, {}, Loss("token kl"), batches, tmp_path)["dense"]
    module, total, count = whole(tiny_llama, network, {}), 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            scores = module(batch.tokens).logits[:, :-1].log_softmax(-1)
            total -= float(scores.gather(2, batch.tokens[:, 1:, None]).sum())
            count += batch.tokens[:, 1:].numel()
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_masked_model_has_no_perplexity(tiny_llama: Path, tmp_path: Path) -> None:
    found = compare(open_network(tiny_llama), {}, Loss("token kl", masked=True), full_batches(), tmp_path)
    assert "perplexity" not in found["dense"].metrics


def test_one_site_at_a_time(tiny_network: Path) -> None:
    network, batches = open_network(tiny_network), padded_batches()
    loss, encoded = loss_of(network.architecture, tiny_network), rounded(open_network(tiny_network), "rtn:bits=2")
    sites = [network.tree.sites[0].name, network.tree.of_block(network.tree.blocks[1])[2].name]
    found = measure_sites(network, [(name, encoded[name]) for name in sites], loss, batches)
    dense = targets(whole(tiny_network, network, {}), loss, batches)
    for name, value in zip(sites, found, strict=True):
        other = targets(whole(tiny_network, network, {name: encoded[name]}), loss, batches)
        assert value == pytest.approx(float(loss.distances(dense, other).mean()), rel=1e-3, abs=1e-7)


def test_sampled_changes_are_spread_and_never_dense() -> None:
    kept = {f"site{i}": dict.fromkeys(("rtn:bits=2", "rtn:bits=4", "dense")) for i in range(30)}
    pairs = single_site_changes(kept, 12)
    assert len(set(pairs)) == 12 and {recipe for _, recipe in pairs} == {"rtn:bits=2", "rtn:bits=4"}
    assert pairs == single_site_changes(kept, 12)
    assert len(single_site_changes({"one": kept["site0"]}, 12)) == 2


def test_spearman_follows_the_pairs_through_the_batches(tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    line = "the old baker repairs a wooden boat near the river and counts seven letters before the storm"
    words = line.split()
    pairs = [(" ".join(words[i:]), " ".join(words[: 3 + i]), float(i % 4)) for i in range(9)]
    batches, index = pair_batches(pairs, tokenizer, 64)
    network, loss = open_network(tiny_bert), loss_of("BertModel", tiny_bert)
    vectors = compare(network, {}, loss, batches, tmp_path)["dense"].vectors
    assert vectors is not None
    module = whole(tiny_bert, network, {})
    for row, (first, second, _) in zip(index.tolist(), pairs, strict=True):
        for place, sentence in zip(row, (first, second), strict=True):
            alone = tokenizer([sentence], return_tensors="pt")
            batch = Batch(alone["input_ids"], None)
            assert torch.allclose(vectors[place], targets(module, loss, (batch,))[0], atol=1e-5)
    similarity = [(vectors[a] @ vectors[b]).item() for a, b in index.tolist()]
    agreeing = [(a, b, s) for (a, b, _), s in zip(pairs, similarity, strict=True)]
    value, low, high = spearman(vectors, index, agreeing, seed=0)
    assert value == pytest.approx(1) and low <= value + 1e-9 and high >= value - 1e-9
    assert spearman(vectors, index, pairs, 3) == spearman(vectors, index, pairs, 3)


def test_latency_is_a_time(tiny_bert: Path) -> None:
    module = whole(tiny_bert, open_network(tiny_bert), {})
    assert 0 < forward_seconds(module, full_batches()[0], runs=2) < 10


def test_an_artifact_is_timed_with_fused_blocks_in_float32(docs_lm: Path, sentences: Path, tmp_path: Path) -> None:
    """docs-lm is stored in half precision, in which a CPU has no fast product."""
    from tests.command import compress

    from layerwise.kernels.library import chosen_path

    done = compress(docs_lm, tmp_path / "OUT", sentences, "--uniform", "rtn:bits=4,group=64")
    assert done.code == 0, done.err
    module, (fused, blocks) = open_for_time(str(tmp_path / "OUT"))
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert blocks == 5 and fused == (0 if chosen_path() is None else 5)
    assert open_for_time(str(docs_lm))[1] == (0, 0)
