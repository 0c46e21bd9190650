"""Pre-LN to Pre-RMSNorm: exact, and exact because every writer is centred."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.normalize.modules import PRE_NORM, error, gpt2, outputs
from torch import nn

from layerwise.errors import InputError
from layerwise.network.network import open_network
from layerwise.network.norms import RECORD, RmsNorm, swap_norms
from layerwise.network.residual import centre, find_stream
from layerwise.technique import find

EXACT = 1e-5
PreRmsnorm = find("pre_rmsnorm")


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("tied", ["untie", "lookup"])
def test_every_norm_of_the_stream_becomes_an_rmsnorm(name: str, tied: str) -> None:
    module = PRE_NORM[name]()
    norms = sum(isinstance(m, nn.LayerNorm) for m in module.modules())
    converted = PreRmsnorm(tied=tied).convert(module)
    assert error(outputs(converted), outputs(module)) < EXACT
    kept = [p for p, m in converted.named_modules() if isinstance(m, nn.LayerNorm)]
    assert kept == (["transformer.word_embeddings_layernorm"] if name == "bloom" else [])
    assert sum(isinstance(m, RmsNorm) for m in converted.modules()) == norms - len(kept)


def test_in_double_precision_it_is_exact() -> None:
    module = gpt2()
    converted = PreRmsnorm().convert(module)
    stream = find_stream(module, "a test")
    exact = copy.deepcopy(module).double()
    twin = PreRmsnorm().convert(module).double()
    with torch.no_grad():
        for name, axis in stream.writers.items():
            twin.get_parameter(name).copy_(centre(exact.get_parameter(name), axis))
    assert error(outputs(twin), outputs(exact)) < 1e-12
    assert error(outputs(converted), outputs(module)) < EXACT


def test_the_stream_has_no_mean_at_any_block() -> None:
    converted, means = PreRmsnorm().convert(gpt2()), []
    for block in converted.transformer.h:
        block.register_forward_pre_hook(lambda m, given: means.append((given[0].mean(-1).abs().max(), given[0].std())))
    outputs(converted)
    assert len(means) == 2 and all(mean < 1e-6 * spread for mean, spread in means)


# ---------------------------------------------------------------- without the idea it fails


def test_rmsnorm_without_centring_is_another_function() -> None:
    module = gpt2()
    swapped = swap_norms(copy.deepcopy(module), find_stream(module, "a test").norms)
    assert error(outputs(swapped), outputs(module)) > 1e-2


@pytest.mark.parametrize("skipped", ["transformer.wpe.weight", "transformer.h.1.mlp.c_proj.bias"])
def test_one_writer_left_out_shows(skipped: str) -> None:
    module = gpt2()
    converted = PreRmsnorm().convert(module)
    with torch.no_grad():
        converted.get_parameter(skipped).copy_(module.get_parameter(skipped))
    assert error(outputs(converted), outputs(module)) > 1e-3


def test_a_head_that_is_centred_with_its_table_shows() -> None:
    module = gpt2()
    converted = PreRmsnorm().convert(module)
    with torch.no_grad():
        converted.lm_head.weight.copy_(converted.transformer.wte.weight)
    assert error(outputs(converted), outputs(module)) > 1e-2
    difference = outputs(converted).view(-1, 90).log_softmax(-1) - outputs(module).view(-1, 90).log_softmax(-1)
    assert float(difference.abs().max()) > 1e-2, "the softmax would have hidden it"


# ---------------------------------------------------------------- checkpoints


def test_untying_stores_two_matrices_and_lookup_one(tiny_gpt2: Path) -> None:
    network = open_network(tiny_gpt2)
    two, one = PreRmsnorm().rewrite(network), PreRmsnorm(tied="lookup").rewrite(network)
    table, head = two.read("transformer.wte.weight"), two.read("lm_head.weight")
    assert torch.equal(head, network.read("transformer.wte.weight"))
    assert torch.allclose(table, head - head.mean(1, keepdim=True), atol=1e-7)
    assert two.checkpoint.config["tie_word_embeddings"] is False
    assert two.tree.parameters == network.tree.parameters
    assert torch.equal(one.read("transformer.wte.weight"), head)
    assert one.checkpoint.config[RECORD]["centred"] == ["transformer.wte"]
    assert [s.name for s in one.tree.sites] == [s.name for s in network.tree.sites]


def test_rows_are_read_as_the_whole_is(tiny_gpt2: Path) -> None:
    rewritten = PreRmsnorm().rewrite(open_network(tiny_gpt2))
    rows = torch.tensor([7, 3, 7])
    whole = rewritten.read("transformer.wte.weight")
    assert torch.equal(rewritten.read_rows("transformer.wte.weight", rows), whole[rows])


def test_an_artifact_of_it_loads_evaluates_and_exports(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    import layerwise

    out = tmp_path / "out"
    layerwise.compress(
        tiny_gpt2, out, uniform="dense", calibrate=str(sentences), sequences=48, length=32, rewrite="pre_rmsnorm",
        threads=1, workers=1,
    )  # fmt: skip
    original = layerwise.load(tiny_gpt2)
    wanted = outputs(original)
    with_layernorms = layerwise.load(out, dtype=torch.float32)
    with_rmsnorms = layerwise.load(out, dtype=torch.float32, rms_norms=True)
    assert type(with_layernorms) is type(original)
    assert not any(isinstance(m, RmsNorm) for m in with_layernorms.modules())
    assert sum(isinstance(m, RmsNorm) for m in with_rmsnorms.modules()) == 5
    for found in (with_layernorms, with_rmsnorms):
        assert error(outputs(found), wanted) < 2e-3  # what half precision costs
    quality = layerwise.evaluate(out, dense=tiny_gpt2, text=str(sentences), length=32, sequences=8)
    assert quality.artifact["kl"] < 1e-5
    with pytest.raises(InputError, match="not made with --rewrite pre_rmsnorm"):
        layerwise.load(tiny_gpt2, rms_norms=True)


def test_the_rewrite_is_part_of_the_runs_identity(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    from layerwise.acts.prepare import Options, prepare
    from layerwise.compress import identity

    given = {"model": str(tiny_gpt2), "uniform": "dense", "calibrate": str(sentences), "sequences": 48, "length": 32}
    plain, rewritten = (identity(prepare(Options(**given, rewrite=r)), "x") for r in (None, "pre_rmsnorm"))
    assert "rewrite" not in plain and rewritten["rewrite"] == "pre_rmsnorm"


@pytest.mark.parametrize("asked", ["awq", "rtn:bits=4"])
def test_only_rewrites_of_networks_are_taken(asked: str, tiny_gpt2: Path) -> None:
    from layerwise.acts.opening import open_rewritten

    with pytest.raises(InputError, match=r"no rewrite of a whole network; there are .*pre_crmsnorm, pre_rmsnorm"):
        open_rewritten(tiny_gpt2, rewrite=asked)
