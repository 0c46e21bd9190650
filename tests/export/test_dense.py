from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.export.dense import export_dense
from layerwise.network.artifact import artifact_layout, open_artifact, staged, write_artifact
from layerwise.network.network import open_network
from layerwise.recipe import parse_recipe


def packed(source: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """An artifact with the linears of ``source`` at 4 bits and everything else as it is stored."""
    network, encoder = open_network(source), parse_recipe("rtn:bits=4,group=16").encoder
    sites = [site for site in network.tree.sites if site.kind == "linear"]
    turned = {site.parameter for site in sites if site.transposed}
    dtype = dtype or network.plain_dtype
    plain = {n: network.read(n).to(dtype) for n in network.plain_parameters([s.name for s in sites])}
    forms = {
        s.parameter: encoder.encode(network.read_site(s), SiteStatistics.uninformed(s.rows, s.columns)) for s in sites
    }
    layout = artifact_layout(
        {name: {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for name, form in forms.items()},
        {name: (t.dtype, tuple(t.shape)) for name, t in plain.items()},
        turned,
    )
    with staged(out) as folder:
        write_artifact(folder, network.checkpoint, layout, forms.items(), plain.items(), turned)
    return out


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_any_tool_can_load_it(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    import safetensors.torch
    import transformers

    source = request.getfixturevalue(name)
    out = packed(source, tmp_path / "out")
    size = export_dense(out, tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    assert size == weights.stat().st_size
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    tensors = safetensors.torch.load_file(weights)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    artifact = open_artifact(out)
    assert all(torch.equal(tensor.float(), artifact.read(n).half().float()) for n, tensor in tensors.items())
    kind = getattr(transformers, config["architectures"][0])
    loaded, report = kind.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report.values()) and loaded.dtype == torch.float16
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    export_dense(out, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_bf16_stays_bf16(tiny_llama: Path, tmp_path: Path):
    out = packed(tiny_llama, tmp_path / "out", torch.bfloat16)
    export_dense(out, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"
    dtypes = {info.dtype for info in open_artifact(tmp_path / "dense").checkpoint.tensors.values()}
    assert dtypes == {torch.bfloat16}


def test_nothing_is_left_of_a_failure(tiny_bert: Path, tmp_path: Path):
    out = packed(tiny_bert, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    site = "encoder.layer.1.output.dense"
    config["quantization_config"]["sites"][site]["encoded"]["bits"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"site {site} cannot be restored"):
        export_dense(out, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == [out]


def test_an_existing_place_is_refused(tiny_bert: Path, tmp_path: Path):
    out = packed(tiny_bert, tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        export_dense(out, out)
    (tmp_path / "dense").mkdir()
    with pytest.raises(InputError, match="exists"):
        export_dense(out, tmp_path / "dense")
    assert export_dense(out, tmp_path / "dense", force=True) > 0
