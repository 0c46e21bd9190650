"""A plan made for an engine holds only what it loads, fused sites share a format, and exporting it always works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.acts.prepare import Options
from layerwise.compress import compress
from layerwise.errors import InputError
from layerwise.export.compressed_tensors import export_compressed_tensors
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network
from layerwise.plan.file import read_plan
from layerwise.plan.fused import groups_among
from layerwise.plan.targets import TARGETS, described, find_target, format_of, spec_of

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("targets")

    def job(name: str, model: Path = tiny_llama, **options: Any) -> Path:
        settings: dict[str, Any] = {
            "techniques": ("rtn",),
            "sequences": 48,
            "length": 32,
            "threads": 1,
            "workers": 1,
            "baseline": False,
        }
        if "plan" not in options and "uniform" not in options:
            settings["budget"] = "9bpw"
        given = Options(str(model), str(folder / name), calibrate=str(sentences), **(settings | options))
        return compress(given).out

    return job


@pytest.fixture(scope="module")
def for_vllm(run: Run) -> Path:
    return run("vllm", target="vllm")


def test_a_plan_for_vllm_is_exported_as_it_is(for_vllm: Path, tmp_path: Path) -> None:
    plan = read_plan(for_vllm / "plan.json")
    assert plan.target == "vllm" and not plan.blocks
    target, artifact = TARGETS["vllm"], open_artifact(for_vllm)
    sites = {s.name: s for s in open_network(for_vllm).tree.sites}
    assert artifact.sites and all(target.refusal(s.spec, sites[n]) is None for n, s in artifact.sites.items())
    assert {s.kind for n, s in sites.items() if n in artifact.sites} == {"linear"}
    groups = groups_among(sites, target)
    assert len(groups) == 2 * len(open_network(for_vllm).tree.blocks)
    for names in groups:
        assert len({format_of(plan.sites[n].recipe, sites[n].columns) for n in names}) == 1
    made = export_compressed_tensors(for_vllm, tmp_path / "ct")
    assert made.target == "vllm" and not made.rounded


def test_its_formats_are_really_mixed(for_vllm: Path) -> None:
    """Without the constraint, and with it, the planner gives blocks different formats."""
    assert len({s.recipe for s in read_plan(for_vllm / "plan.json").sites.values()}) > 2


@pytest.mark.parametrize("name", ["transformers", "llama.cpp", "onnxruntime"])
def test_plans_for_other_engines_hold_what_they_load(name: str, run: Run) -> None:
    out = run(name, target=name, budget="7bpw" if name == "llama.cpp" else "11bpw")
    sites = {s.name: s for s in open_network(out).tree.sites}
    encoded = open_artifact(out).sites
    assert encoded and all(TARGETS[name].refusal(s.spec, sites[n]) is None for n, s in encoded.items())
    assert read_plan(out / "plan.json").target == name


def test_a_plan_is_applied_for_its_target(for_vllm: Path, run: Run, tmp_path: Path) -> None:
    again = run("again", plan=str(for_vllm / "plan.json"))
    assert (again / "model.safetensors").read_bytes() == (for_vllm / "model.safetensors").read_bytes()
    assert read_plan(again / "plan.json").target == "vllm"
    with pytest.raises(InputError, match="the plan was made for vllm; plan again with --target transformers"):
        run("other", plan=str(for_vllm / "plan.json"), target="transformers")
    value = json.loads((for_vllm / "plan.json").read_text())
    sites = value["sites"]
    name = next(n for n in sites if n.endswith("q_proj"))
    other = next(s["recipe"] for s in sites.values() if s["recipe"] not in (sites[name]["recipe"], "dense"))
    sites[name]["recipe"] = other
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"self_attn q_proj .* multiplies these as one matrix; give them one format"):
        run("edited", plan=str(tmp_path / "plan.json"))
    value["target"] = "vlm"
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="there is no target 'vlm'"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"techniques": ("gptq:bits=3,group=64",)}, "3 bits in groups of 64 with zeros, which vllm does not load"),
        ({"techniques": ("nf4",)}, "nf4 makes nothing that vllm loads"),
        ({"techniques": ("hqq",)}, "hqq makes nothing that vllm loads"),
        ({"uniform": "rtn:bits=3,group=32"}, "3 bits in groups of 32 with zeros, which vllm does not load"),
        (
            {"fix": ("model.layers.0.self_attn.q_proj=rtn:bits=5",)},
            "--fix gives model.layers.0.self_attn.q_proj 5 bits",
        ),
        ({"activations": "token_int:bits=8"}, "vllm loads no quantized inputs of ours"),
        ({"allocators": ("hawq",)}, "must share a format, which --allocator hawq does not know"),
        ({"target": "vllmm"}, "there is no target 'vllmm'"),
    ],
)
def test_what_an_engine_cannot_have_is_refused_first(options: dict[str, Any], words: str, run: Run) -> None:
    with pytest.raises(InputError, match=words):
        run("never", **({"target": "vllm"} | options))


def test_a_uniform_setting_leaves_the_rest_at_16_bits(run: Run, tmp_path: Path) -> None:
    out = run("uniform", target="vllm", uniform="rtn:bits=4,group=32,symmetric=true")
    kept = {n for n, s in read_plan(out / "plan.json").sites.items() if s.recipe == "dense"}
    assert "model.embed_tokens" in kept and not any(n.endswith("q_proj") for n in kept)
    export_compressed_tensors(out, tmp_path / "ct", target="vllm")


def test_a_kept_site_keeps_those_it_is_fused_with(run: Run, tmp_path: Path) -> None:
    out = run("kept", target="vllm", keep=("layers.0.self_attn.q_proj",), budget="10bpw")
    plan = read_plan(out / "plan.json")
    assert all(plan.sites[f"model.layers.0.self_attn.{n}_proj"].recipe == "dense" for n in "qkv")
    export_compressed_tensors(out, tmp_path / "ct", target="vllm")


def test_a_recipe_is_known_by_what_it_stores() -> None:
    assert described(spec_of("rtn:bits=3,group=64")) == "3 bits in groups of 64 with zeros"
    assert format_of("rtn:bits=4,group=64,symmetric=true", 64) == format_of("gptq:group=0,symmetric=true", 64)
    assert find_target("layerwise") is None
    vllm, llama = TARGETS["vllm"], TARGETS["llama.cpp"]
    assert vllm.holds(spec_of("gptq:bits=4,group=128")) and not vllm.holds(spec_of("gptq:bits=8,group=128"))
    assert llama.holds(spec_of("ternary:group=256")) and not llama.holds(spec_of("ternary:group=64"))
