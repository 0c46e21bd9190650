"""An artifact as a compressed-tensors checkpoint: its bytes, its way back, and what transformers makes of it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.export.compressed_tensors import export_compressed_tensors
from layerwise.jobs.exporting import ExportOptions, export
from layerwise.network.artifact import artifact_layout, open_artifact, staged, write_artifact
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.recipe import parse_recipe

SYMMETRIC = "rtn:bits=4,group=32,symmetric=true"


def packed(source: Path, out: Path, recipes: Mapping[str, str], kinds: tuple[str, ...] = ("linear",)) -> Path:
    """An artifact whose sites have the recipe of the first key that their name contains; others stay dense."""
    network = open_network(source)
    forms: dict[str, Encoded] = {}
    for site in network.tree.sites:
        recipe = next((r for part, r in recipes.items() if part in site.name), None)
        if recipe is not None and site.kind in kinds:
            encoder, nothing = parse_recipe(recipe).encoder, SiteStatistics.uninformed(site.rows, site.columns)
            forms[site.parameter] = encoder.encode(network.read_site(site), nothing)
    turned = {s.parameter for s in network.tree.sites if s.transposed and s.parameter in forms}
    names = network.plain_parameters([name.removesuffix(".weight") for name in forms])
    plain = {n: network.read(n).to(network.plain_dtype) for n in names}
    layout = artifact_layout(
        {name: {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for name, form in forms.items()},
        {name: (t.dtype, tuple(t.shape)) for name, t in plain.items()},
        turned,
    )
    with staged(out) as folder:
        write_artifact(folder, network.checkpoint, layout, forms.items(), plain.items(), turned)
    return out


def codes_of(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes of words [rows, n], bit by bit from the format's description."""
    single = ((words.long()[..., None] >> torch.arange(32)) & 1).flatten(1)[:, : count * bits]
    return (single.view(len(words), count, bits) << torch.arange(bits)).sum(-1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_the_bytes_are_those_that_the_format_describes(bits: int, group: int, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = f"rtn:bits={bits},group={group},symmetric=true"
    out = packed(tiny_llama, tmp_path / "out", {"self_attn": recipe, "mlp.up_proj": recipe, "gate_proj": recipe})
    made = export_compressed_tensors(out, tmp_path / "ct")
    file = tmp_path / "ct" / "model.safetensors"
    assert made.bytes == file.stat().st_size and not made.rounded
    tensors, artifact = load_file(file), open_artifact(out)
    for name, site in artifact.sites.items():
        rows, columns = site.spec["shape"]
        assert tensors[f"{name}.weight_shape"].tolist() == [rows, columns]
        codes = codes_of(tensors[f"{name}.weight_packed"], columns, bits) - 2 ** (bits - 1)
        steps = tensors[f"{name}.weight_scale"].float().repeat_interleave(group or columns, 1)
        assert torch.equal(codes * steps, artifact.encoded(name).decode())
        assert f"{name}.weight_zero_point" not in tensors and f"{name}.weight" not in tensors


def test_zeros_are_packed_along_the_outputs(tiny_llama: Path, tmp_path: Path) -> None:
    out = packed(
        tiny_llama, tmp_path / "out", {"q_proj": "rtn:bits=4,group=32", "k_": "rtn:group=32", "v_": "rtn:group=32"}
    )
    made = export_compressed_tensors(out, tmp_path / "ct")
    assert made.target == "vllm"
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["dequantize"] is True and len(config["config_groups"]) == 1
    tensors, artifact = load_file(tmp_path / "ct" / "model.safetensors"), open_artifact(out)
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = artifact.sites[name].spec["shape"]
    zeros = codes_of(tensors[f"{name}.weight_zero_point"].T, rows, 4).T.repeat_interleave(32, 1)
    codes = codes_of(tensors[f"{name}.weight_packed"], columns, 4)
    steps = tensors[f"{name}.weight_scale"].float().repeat_interleave(32, 1)
    assert torch.equal((codes - zeros) * steps, artifact.encoded(name).decode())


def test_transformers_is_not_asked_to_decode_several_formats(tiny_llama: Path, tmp_path: Path) -> None:
    """It would decode all of them as the first."""
    recipes = {"self_attn.o_proj": "rtn:bits=4,group=32", "gate_proj": SYMMETRIC, "up_proj": SYMMETRIC}
    made = export_compressed_tensors(packed(tiny_llama, tmp_path / "out", recipes), tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert made.target == "vllm" and len(config["config_groups"]) == 2 and "dequantize" not in config


MIXED = {
    "q_proj": "rtn:bits=8,group=0,symmetric=true",
    "k_proj": SYMMETRIC,
    "v_proj": "rtn:bits=2,group=16,symmetric=true",
    "up_proj": "rtn:bits=4,group=64,symmetric=true",
}


def test_a_mixed_plan_is_several_groups_and_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    out = packed(tiny_llama, tmp_path / "out", MIXED)
    made = export_compressed_tensors(out, tmp_path / "ct")
    assert made.target == "transformers"  # q, k and v differ
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    named = [name for group in groups for name in group["targets"]]
    artifact = open_artifact(out)
    assert len(groups) >= 3 and sorted(named) == sorted(artifact.sites)
    linears = {s.name for s in open_network(tiny_llama).tree.sites if s.kind == "linear"}
    assert set(config["ignore"]) == (linears | {"lm_head"}) - set(named) and "dequantize" not in config
    again = open_network(tmp_path / "ct")
    for name in artifact.sites:
        assert torch.equal(again.read(f"{name}.weight"), artifact.read(f"{name}.weight"))
    plain = load_file(tmp_path / "ct" / "model.safetensors")
    assert all(torch.equal(again.read(name), plain[name].float()) for name in artifact.plain)
    export_compressed_tensors(out, tmp_path / "once more")
    first, second = (tmp_path / d / "model.safetensors" for d in ("ct", "once more"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("rtn:bits=3,group=32,symmetric=true", "q_proj has 3 bits in groups of 32 without zeros"),
        ("rtn:bits=4,group=32,scale_bits=8", "8-bit scales; .* takes fp16 steps"),
        ("rtn:bits=4,group=48,symmetric=true", "groups of 48"),
        ("ternary:group=32", "q_proj has the form ternary"),
        ("nf4:group=32", "q_proj has the form codebook"),
        ("svd_llm:ratio=0.5", "q_proj has the form"),
        ("hqq:bits=4,group=32", "real zeros"),
    ],
)
def test_what_has_no_such_grid_is_refused_by_name(recipe: str, words: str, tiny_llama: Path, tmp_path: Path) -> None:
    out = packed(tiny_llama, tmp_path / "out", {"layers.1.self_attn.q_proj": recipe})
    with pytest.raises(InputError, match=f"model.layers.1.self_attn.{words}|{words}"):
        export_compressed_tensors(out, tmp_path / "ct", target="transformers")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fused_sites_of_two_formats_are_refused_for_vllm(tiny_llama: Path, tmp_path: Path) -> None:
    out = packed(tiny_llama, tmp_path / "out", {"q_proj": SYMMETRIC, "k_proj": SYMMETRIC})
    with pytest.raises(InputError, match=r"self_attn has q_proj 4 bits .* v_proj 16 bits; vllm multiplies them as one"):
        export_compressed_tensors(out, tmp_path / "ct", target="vllm")
    assert export_compressed_tensors(out, tmp_path / "ct").target == "transformers"


def test_other_engines_and_tables_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    out = packed(tiny_llama, tmp_path / "out", {"embed": SYMMETRIC}, kinds=("table",))
    with pytest.raises(InputError, match=r"embed_tokens has 4 bits .* takes this site at 16 bits only"):
        export_compressed_tensors(out, tmp_path / "ct")
    with pytest.raises(InputError, match="does not load compressed-tensors; export for it with --to gguf"):
        export_compressed_tensors(out, tmp_path / "ct", target="llama.cpp")
    with pytest.raises(InputError, match=r"no target 'vlm'; did you mean 'vllm'|no target 'vlm'"):
        export_compressed_tensors(out, tmp_path / "ct", target="vlm")
    with pytest.raises(InputError, match="there is no export to 'gguff'"):
        export(str(out), str(tmp_path / "ct"), "gguff", ExportOptions())


def rounded(out: Path, place: Path, target: str, text: Path) -> list[str]:
    options = ExportOptions(reencode=True, text=str(text), target=target)
    return export(str(out), str(place), "compressed-tensors", options)


def test_reencoding_names_what_it_rounds_and_measures_it(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    recipes = {
        "q_proj": "rtn:bits=3,group=32,symmetric=true", "k_proj": "ternary:group=32", "up_proj": "rtn:bits=5,group=32",
        "down_proj": "nf4:group=16", "embed": SYMMETRIC,
    }  # fmt: skip
    out = packed(tiny_llama, tmp_path / "out", recipes, kinds=("linear", "table"))
    said = "\n".join(rounded(out, tmp_path / "ct", "transformers", sentences))
    artifact, again = open_artifact(out), open_network(tmp_path / "ct")
    assert f"warning: {len(artifact.sites)} sites were rounded for transformers" in said
    assert "1 × 4 bits in groups of 32 without zeros -> 16 bits" in said  # the table
    assert "2 × 3 bits in groups of 32 without zeros -> 4 bits in groups of 32 without zeros" in said
    loss = re.search(r"kl ([0-9.e-]+) \(was 0\), .*perplexity [0-9.]+ \(was [0-9.]+\)", said)
    assert loss is not None and 0 < float(loss[1]) < 0.01, said
    for name in artifact.sites:
        was, now = artifact.read(f"{name}.weight"), again.read(f"{name}.weight")
        if "q_proj" in name or "k_proj" in name:  # 3 bits lie inside 4 of the same step, trits inside 2 bits
            assert torch.equal(was, now)
        assert (was - now).norm() < 0.1 * was.norm(), name


def test_reencoding_for_vllm_gives_fused_sites_one_format(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    recipes = {"q_proj": "rtn:bits=3,group=32", "k_proj": SYMMETRIC, "v_proj": "rtn:bits=8,group=32", "up_": SYMMETRIC}
    out = packed(tiny_llama, tmp_path / "out", recipes)
    assert "for vllm" in rounded(out, tmp_path / "ct", "vllm", sentences)[-1]
    export_compressed_tensors(tmp_path / "ct", tmp_path / "again", target="vllm")  # and what it wrote fits as it is
    kept = open_artifact(tmp_path / "ct").sites
    formats = {n.rpartition(".")[2]: (s.spec["bits"], s.spec["group"], s.spec["symmetric"]) for n, s in kept.items()}
    assert formats["q_proj"] == formats["k_proj"] == formats["v_proj"]
    assert "up_proj" not in formats  # its gate is at 16 bits


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="the compressed-tensors package is not installed (pip install layerwise[compressed-tensors])",
)


@needs_package
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_transformers_computes_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import transformers

    source = request.getfixturevalue(name)
    network = open_network(source)
    recipes = {"q_proj": "rtn:bits=8,group=0,symmetric=true", "": "rtn:bits=4,group=16,symmetric=true"}
    even = [s.name for s in network.tree.sites if s.columns % 16 == 0]
    out = packed(source, tmp_path / "out", {n: next(r for p, r in recipes.items() if p in n) for n in even})
    export_compressed_tensors(out, tmp_path / "ct")
    kind = getattr(transformers, network.architecture)
    model, report = kind.from_pretrained(tmp_path / "ct", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert any("weight_packed" in n for n, _ in model.state_dict().items())
    tokens = torch.arange(5, 29)[None]
    with torch.no_grad():
        found = model.eval()(tokens)[0]
        wanted = load(out, dtype=torch.float32)(tokens)[0]
    assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)


@needs_package
def test_transformers_decodes_what_has_zeros(tiny_llama: Path, tmp_path: Path) -> None:
    import transformers

    recipe = "rtn:bits=4,group=32"
    out = packed(tiny_llama, tmp_path / "out", {"self_attn": recipe})
    export_compressed_tensors(out, tmp_path / "ct")
    model, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ct", output_loading_info=True)
    assert not any(report.values())
    decoded = {name: open_artifact(out).read(f"{name}.weight") for name in open_artifact(out).sites}
    for name, value in decoded.items():
        found = model.get_submodule(name).weight.float()
        assert torch.allclose(found, value, rtol=1e-3, atol=1e-6)
