"""Layers of experts: opened into linears, read from every way they are stored, saved, loaded and exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command import compress, layerwise
from torch import Tensor, nn

from layerwise.network.artifact import open_artifact
from layerwise.network.experts import Experts, computes_alike, experts_of, fused_names, open_experts
from layerwise.network.network import Network, open_network
from layerwise.network.packed import PackedLinear

NETWORKS = ("tiny_mixtral", "tiny_qwen3_moe", "tiny_qwen2_moe")


@pytest.fixture(params=NETWORKS)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def dense(path: Path) -> nn.Module:
    import transformers

    made: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return made


def pieces_of(module: nn.Module, network: Network) -> dict[str, Tensor]:
    """Parameter of an expert -> its matrix, cut from a dense module's fused parameters."""
    found = {}
    for path, experts in experts_of(network.module).items():
        for name, part, start, shape in experts.slices():
            whole = module.get_parameter(f"{path}.{experts.fused[part]}").data.flatten()
            found[f"{path}.{name}"] = whole[start : start + shape[0] * shape[1]].view(shape)
    return found


def fill(opened: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        opened.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


@torch.inference_mode()
def logits(module: nn.Module) -> Tensor:
    out: Tensor = module(input_ids=torch.arange(3, 99).view(4, 24)).logits.float()
    return out


# ---------------------------------------------------------------- opening


def test_every_matrix_of_every_expert_is_a_site(source: Path) -> None:
    network, module = open_network(source), dense(source)
    pieces = pieces_of(module, network)
    experts = {s.parameter: s for s in network.tree.sites if s.experts}
    assert set(experts) == set(pieces)
    for name, piece in pieces.items():
        site = experts[name]
        assert (site.rows, site.columns) == tuple(piece.shape) and site.searched and site.block
        assert torch.equal(network.read_site(site), piece)
    assert network.tree.parameters == sum(p.numel() for p in module.parameters())
    assert not any(s.name.endswith("mlp.gate") for s in network.tree.sites), "the router stays as it is"


def test_the_opened_layer_computes_what_the_fused_one_does(source: Path) -> None:
    network, module = open_network(source), dense(source)
    opened, expected = copy.deepcopy(module), logits(module)
    pieces = pieces_of(module, network)
    assert set(open_experts(opened)) == set(experts_of(network.module))
    fill(opened, pieces)
    torch.testing.assert_close(logits(opened), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_experts_in_one_tensor_are_read_in_place(tiny_mixtral: Path, tmp_path: Path) -> None:
    """A checkpoint that holds all experts of a layer in one tensor gives the same matrices."""
    module = dense(tiny_mixtral)
    save_file({n: p.detach().clone() for n, p in module.named_parameters()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_mixtral / "config.json").read_text())
    fused, apart = open_network(tmp_path), open_network(tiny_mixtral)
    assert fused.tree == apart.tree
    for site in apart.tree.sites:
        assert torch.equal(fused.read_site(site), apart.read_site(site)), site.name


def test_other_ways_to_mix_experts_stay_as_they_are() -> None:
    """The structure alone is not trusted: what computes something else is left closed."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(3, 8, 6))
            self.down = nn.Parameter(torch.zeros(3, 6, 4))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for t, (experts, weights) in enumerate(zip(chosen, shares, strict=True)):
                for e, w in zip(experts, weights, strict=True):
                    gate, up = (self.gate_up[e] @ x[t]).chunk(2)
                    out[t] += w * (self.down[e] @ (self.act_fn(gate) * self.squashed(up)))
            return out

        def squashed(self, up: Tensor) -> Tensor:
            return up.clamp(max=0.5)

    class Plain(Clamped):
        def squashed(self, up: Tensor) -> Tensor:
            return up

    assert fused_names(Clamped()) == ("gate_up", "down")
    assert computes_alike(Plain(), ("gate_up", "down")) and not computes_alike(Clamped(), ("gate_up", "down"))
    network = nn.Sequential(Clamped(), Plain())
    assert set(open_experts(network)) == {"1"} and isinstance(network[1], Experts)


def test_block_by_block_is_the_whole_network(source: Path) -> None:
    from layerwise.network.streaming import Batch, Streamer

    network, tokens = open_network(source), torch.arange(3, 51).view(2, 24)
    streamer, batch = Streamer(network), Batch(tokens, None)
    with torch.inference_mode():
        with streamer.head_of_network() as enter:
            hidden = enter(batch, 0)[0]
        for index in range(len(network.tree.blocks)):
            with streamer.block(index) as block, streamer.head_of_network() as enter:
                hidden = streamer.run_block(block, hidden, enter(batch, index)[1])
        with streamer.tail() as leave:
            got = leave(batch, hidden)[0]
        expected = dense(source)(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# ---------------------------------------------------------------- the whole job


def with_decoded(source: Path, out: Path) -> nn.Module:
    """The dense network with what the artifact decodes to."""
    network, artifact, module = open_network(source), open_artifact(out), dense(source)
    pieces = pieces_of(module, network)
    with torch.no_grad():
        for name, piece in pieces.items():
            piece.copy_(artifact.read(name))
        fused = {f"{path}.{name}" for path, e in experts_of(network.module).items() for name in e.fused}
        for name, parameter in module.named_parameters():
            if name not in fused:
                parameter.copy_(artifact.read(name))
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_compressed_loaded_saved_and_exported(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, sentences: Path
) -> None:
    import transformers

    import layerwise as library

    source, out = request.getfixturevalue(name), tmp_path / "out"
    done = compress(source, out, sentences, "--budget", "6.5bpw", "--no-baseline")
    assert done.code == 0, done.err
    plan = json.loads((out / "plan.json").read_text())
    assert plan["predicted"]["bytes"] == (out / "model.safetensors").stat().st_size
    stored = load_file(out / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in stored

    loaded, expected = library.load(out, dtype=torch.float32), logits(with_decoded(source, out))
    packed = [p for p, m in loaded.named_modules() if isinstance(m, PackedLinear) and ".experts." in p]
    assert packed
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), logits(loaded)
    )

    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(loaded))

    done = layerwise("export", out, tmp_path / "dense", "--to", "dense")
    assert done.code == 0, done.err
    kind = type(dense(source))
    exported, report = kind.from_pretrained(tmp_path / "dense", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == set(load_file(source / "model.safetensors"))
    torch.testing.assert_close(logits(exported), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_an_artifact_that_keeps_everything_at_16_bits_loads(
    tiny_mixtral: Path, tmp_path: Path, sentences: Path
) -> None:
    import layerwise as library

    done = compress(tiny_mixtral, tmp_path / "out", sentences, "--uniform", "dense", "--no-baseline")
    assert done.code == 0, done.err
    expected = logits(with_decoded(tiny_mixtral, tmp_path / "out"))
    found = logits(library.load(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
