from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.encoding.dense import Dense
from layerwise.errors import InputError
from layerwise.network import artifact as module
from layerwise.network.artifact import artifact_layout, open_artifact, predicted_size, staged, write_artifact
from layerwise.network.artifact_config import parse_sites
from layerwise.network.checkpoint import open_checkpoint
from layerwise.network.network import open_network

TINY = ("tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_bert_classifier")


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_is_what_was_encoded(name: str, request: pytest.FixtureRequest, pack: Any):
    source = request.getfixturevalue(name)
    out = pack(source)
    network, artifact = open_network(source), open_artifact(out)
    assert artifact.size == sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    searched = {site.name: site for site in network.tree.sites if site.searched}
    assert set(artifact.specs) == set(searched)
    for site in searched.values():
        assert artifact.encoded(site.name).shape == (site.rows, site.columns)
        dense = network.read(site.parameter)
        kept = artifact.read(site.parameter)
        assert kept.shape == dense.shape
        assert float((kept - dense).square().mean() / dense.square().mean()) < 0.02
    for plain in network.plain_parameters(searched):
        assert torch.equal(artifact.read(plain), network.read(plain).half().float())
    assert not any(key.startswith("lm_head") for key in artifact.checkpoint.tensors)


def test_parts_and_rows(tiny_gpt2: Path, pack: Any):
    network, artifact = open_network(tiny_gpt2), open_artifact(pack(tiny_gpt2))
    block = network.tree.blocks[1]
    part = artifact.read_part(block)
    assert {n: t.shape for n, t in part.items()} == {n: t.shape for n, t in network.read_part(block).items()}
    index = torch.tensor([5, 0, 5])
    for table in ("transformer.wte.weight", "transformer.wpe.weight"):
        assert torch.equal(artifact.read_rows(table, index), artifact.read(table)[index])


def test_same_bytes_every_time(tiny_llama: Path, pack: Any):
    first, second = pack(tiny_llama, name="first"), pack(tiny_llama, name="second")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_dense_site_is_an_ordinary_parameter(tiny_gpt2: Path, pack: Any):
    artifact = open_artifact(pack(tiny_gpt2, recipe="dense"))
    assert artifact.sites == {} and "quantization_config" not in artifact.config
    network = open_network(tiny_gpt2)
    for site in network.tree.sites:
        assert torch.equal(artifact.read(site.parameter), network.read(site.parameter).half().float())


def test_code_and_old_quantization_are_not_carried_over(tiny_llama: Path):
    checkpoint = open_checkpoint(tiny_llama)
    checkpoint.config.update(auto_map={"AutoModel": "x.Y"}, dtype=None)
    config = module.artifact_config(checkpoint, {})
    assert "auto_map" not in config and config["dtype"] == "float32"


# ---------------------------------------------------------------- staging


def test_staging_is_one_rename(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1" and list(out.parent.iterdir()) == [out]
    with pytest.raises(InputError, match="exists; choose another place or give --force"), staged(out):
        pass
    with staged(out, force=True) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in out.iterdir()] == ["b"] and list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_what_was_there(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(RuntimeError), staged(out, force=True) as folder:
        (folder / "new").write_text("2")
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [out]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"), staged(file, force=True):
        pass


def test_a_wrong_announcement_is_caught(tiny_llama: Path, tmp_path: Path):
    checkpoint = open_checkpoint(tiny_llama)
    form = Dense.of(torch.ones(2, 3), torch.float16)
    layout = artifact_layout({"a.weight": {"": (torch.float16, (2, 4))}}, {})
    with pytest.raises(ValueError, match="announced as"):
        write_artifact(tmp_path / "out", checkpoint, layout, [("a.weight", form)], [])
    with pytest.raises(ValueError, match="stored twice"):
        artifact_layout({"a.weight": {"": (torch.float16, (2, 4))}}, {"a.weight": (torch.float16, (2, 4))})


def test_companion_weights_count(tiny_bert: Path, tmp_path: Path):
    import shutil

    source = tmp_path / "network"
    shutil.copytree(tiny_bert, source)
    (source / "2_Dense").mkdir()
    shutil.copyfile(source / "model.safetensors", source / "2_Dense" / "model.safetensors")
    (source / "modules.json").write_text('[{"path": "2_Dense"}]')
    checkpoint = open_checkpoint(source)
    plain: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"a": (torch.float16, (3,))}
    tensors: list[tuple[str, Tensor]] = [("a", torch.ones(3).half())]
    size = write_artifact(tmp_path / "out", checkpoint, artifact_layout({}, plain), [], tensors)
    assert size == predicted_size({}, plain, checkpoint)
    assert size == open_checkpoint(tmp_path / "out").safetensors_bytes > checkpoint.safetensors_bytes // 2


# ---------------------------------------------------------------- damage


def test_damaged_descriptions(tiny_llama: Path, pack: Any):
    out = pack(tiny_llama)
    config = json.loads((out / "config.json").read_text())
    site = "model.layers.0.mlp.up_proj"

    def opened(change: dict[str, Any]) -> module.Artifact:
        described = config["quantization_config"] | change
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
        return open_artifact(out)

    for change, message in (
        ({"quant_method": "hqq"}, "not a layerwise artifact: its quant_method is 'hqq'"),
        ({"format_version": 99}, "upgrade layerwise"),
        ({"format_version": "1"}, "whole number"),
        ({"sites": []}, "has no sites"),
        ({"sites": {site: {}}}, f"site {site} does not say"),
        ({"sites": {site: {"encoded": {"shape": [3]}}}}, "does not say"),
        ({"sites": {"elsewhere": config["quantization_config"]["sites"][site]}}, "nothing for its site elsewhere"),
    ):
        with pytest.raises(InputError, match=message):
            opened(change)
    wrong = {"encoded": {"form": "unheard", "shape": [2, 2]}}
    with pytest.raises(InputError, match=f"site {site} cannot be restored: there is no stored form named"):
        opened({"sites": {site: wrong}}).encoded(site)
    with pytest.raises(InputError, match="quant_method is None"):
        parse_sites("layerwise")  # type: ignore[arg-type]
