"""``layerwise export --to …`` and ``layerwise import``: what is printed, and the measured loss of rounding again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import layerwise
from tests.export.artifacts import artifact

from layerwise.errors import InputError
from layerwise.export.gguf import rounded
from layerwise.jobs.exporting import ExportOptions, export
from layerwise.jobs.rounding_loss import loss_of_rounding
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network


def test_gguf_and_back(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, file = artifact(tiny_llama, tmp_path / "out", "rtn:bits=4,group=32,symmetric=true"), tmp_path / "x.gguf"
    done = layerwise("export", str(out), str(file), "--to", "gguf")
    assert done.code == 2 and "172 columns" in done.err and "--reencode" in done.err and not file.exists()
    done = layerwise("export", str(out), str(file), "--to", "gguf", "--reencode", "--evaluate", str(sentences))
    assert done.code == 0, done.err
    assert "12 Q4_0" in done.out or "13 Q4_0" in done.out
    assert "warning: 2 sites have no exact type" in done.out and "kl to the artifact" in done.out
    done = layerwise("import", str(file), str(tmp_path / "kept"))
    assert done.code == 0 and f"{open_artifact(tmp_path / 'kept').size:,} bytes" in done.out
    done = layerwise("inspect", str(file))
    assert done.code == 0 and "LlamaForCausalLM" in done.out
    done = layerwise("inspect", str(tmp_path / "absent.gguf"))
    assert done.code == 2 and "absent.gguf" in done.err


def test_what_rounding_loses_is_none_where_nothing_changed_and_grows(
    tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    out = artifact(tiny_llama, tmp_path / "out", "rtn:bits=8,group=64")
    stored, network = open_artifact(out), open_network(out)
    site = "model.layers.0.mlp.gate_proj"
    before, after = loss_of_rounding(network, {site: lambda: stored.encoded(site)}, str(sentences))
    assert before["kl"] == 0 and after["kl"] < 1e-6
    _, worse = loss_of_rounding(network, {site: lambda: rounded(stored.encoded(site), "Q4_0")}, str(sentences))
    assert worse["kl"] > 10 * after["kl"]


def test_a_format_that_is_not_there(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(InputError, match="did you mean gguf"):
        export(str(tiny_llama), str(tmp_path / "x"), "gguff", ExportOptions())
