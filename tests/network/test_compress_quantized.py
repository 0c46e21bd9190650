"""A network that came quantized is compressed further: its encodings are candidates that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.network.quantized_elsewhere import quantized

from layerwise.acts.prepare import Options
from layerwise.compress import compress
from layerwise.evaluate.artifact import evaluate_artifact
from layerwise.export.compressed_tensors import export_compressed_tensors
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network
from layerwise.plan.file import read_plan


def settings(model: Path, out: Path, text: Path, **options: Any) -> Options:
    given = {"sequences": 48, "length": 32, "threads": 1, "workers": 1, "baseline": False, "techniques": ("rtn",)}
    return Options(str(model), str(out), calibrate=str(text), **(given | options))


def test_what_fits_is_kept_and_the_rest_is_encoded_again(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    values = quantized(tiny_llama, tmp_path / "in", "gptq", group=32)
    dense = open_artifact(tmp_path / "in").size
    out = compress(settings(tmp_path / "in", tmp_path / "out", sentences, budget=f"{dense - 20000}B")).out
    sites = read_plan(out / "plan.json").sites
    kept = {name for name, site in sites.items() if site.recipe.startswith("kept:")}
    assert kept and all(sites[name].damage == 0 and f"{name}.weight" in values for name in kept)
    artifact, source = open_artifact(out), open_network(tmp_path / "in")
    for name in kept:
        assert torch.equal(artifact.read(f"{name}.weight"), values[f"{name}.weight"])
    assert any(site.recipe.startswith("rtn:") for site in sites.values()) and source.kept(source.tree.sites[0]) is None
    made = export_compressed_tensors(tmp_path / "in", tmp_path / "ct")  # and without compressing at all
    again = open_network(tmp_path / "ct")
    assert made.target == "vllm" and all(torch.equal(again.read(name), value) for name, value in values.items())


def test_it_is_measured_against_its_dense_network(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    from layerwise.acts.prepare import open_tokenizer
    from layerwise.calibrate.text import read_text

    quantized(tiny_llama, tmp_path / "in", "gptq", group=32)
    network, text = open_network(tiny_llama), read_text(str(sentences))
    found = evaluate_artifact(str(tmp_path / "in"), str(tiny_llama), text, open_tokenizer(network), None, 8, 32)
    assert 0 < found.artifact["kl"] < 1 and found.bytes < found.dense_bytes


def test_an_artifact_of_ours_opens_as_a_network_too(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    first = compress(settings(tiny_llama, tmp_path / "out", sentences, uniform="rtn:bits=4,group=32")).out
    network, artifact = open_network(first), open_artifact(first)
    for site in network.tree.sites:
        assert torch.equal(network.read(site.parameter), artifact.read(site.parameter))
        rows = torch.tensor([1, 0])
        assert torch.equal(network.read_rows(site.parameter, rows), artifact.read_rows(site.parameter, rows))
    again = compress(settings(first, tmp_path / "again", sentences, budget=f"{artifact.size}B")).out
    plan = read_plan(again / "plan.json")
    recipes = [site.recipe for site in plan.sites.values()]  # a few bytes of the header may go to one site
    assert plan.predicted.damage < 1e-5 and recipes.count("kept:bits=4,group=32") >= len(recipes) - 1
