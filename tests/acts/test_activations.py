"""``--activations`` end to end: what is evaluated is what the saved network runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import compress, layerwise

from layerwise.network.artifact import open_artifact
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.network.packed import PackedHead, PackedLinear
from layerwise.network.quantized_inputs import quantize_inputs
from layerwise.network.skeleton import materialised, parameter_owners

SETTING = "token_int:bits=4"
ROW = "plan, quantized activations"
TOKENS = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def kept(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


def kl(out: Path, row: str) -> float:
    found = next(r for r in kept(out, "evidence.json")["rows"] if r["name"] == row)
    return float(found["quality"]["kl"]["value"])


def from_decoded(out: Path, dense: Path) -> torch.Tensor:
    """The artifact's logits by the path of evaluation: decoded matrices, inputs rounded by hooks."""
    artifact = open_artifact(out)
    network = quantize_inputs(open_network(dense).again(), artifact.inputs)
    owners = parameter_owners(network.module).values()  # a tied table and head are one
    values = {name: artifact.read(names[0]) for names in owners for name in names}
    with torch.inference_mode(), materialised(network.module, values) as module:
        return torch.as_tensor(module(TOKENS).logits)


def loaded(out: Path) -> torch.nn.Module:
    return load(out, dtype=torch.float32)


@pytest.fixture(scope="module")
def dynamic(tiny_qwen2: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("activations") / "dynamic"
    done = compress(tiny_qwen2, out, sentences, "--uniform", "rtn:bits=8,group=16", "--activations", SETTING)
    assert done.code == 0, done.err
    assert "quantized activations" in done.out
    return out


@pytest.fixture(scope="module")
def static(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, work folder) of a plan with measured ranges."""
    folder = tmp_path_factory.mktemp("activations")
    done = compress(
        tiny_llama, folder / "out", sentences, "--budget", "7bpw", "--techniques", "awq+rtn,rtn", "--no-baseline",
        "--work", folder / "work", "--activations", "dgq:bits=6,groups=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "out", folder / "work"


def test_the_setting_is_stored_and_shown(dynamic: Path) -> None:
    described = kept(dynamic, "config.json")["quantization_config"]
    assert described["format_version"] == 2
    with_grid = {name for name, site in described["sites"].items() if "inputs" in site}
    assert with_grid == {name for name in described["sites"] if ".layers." in name}, "not tables and heads"
    assert described["sites"][min(with_grid)]["inputs"] == {"form": "token", "bits": 4}
    assert kept(dynamic, "plan.json")["activations"] == SETTING
    assert kl(dynamic, "dense") == 0 < kl(dynamic, "plan") < kl(dynamic, ROW)
    assert SETTING in (dynamic / "report.html").read_text() and ROW in (dynamic / "README.md").read_text()


def test_without_the_setting_nothing_is_said(tiny_qwen2: Path, sentences: Path, tmp_path: Path) -> None:
    done = compress(tiny_qwen2, tmp_path / "out", sentences, "--uniform", "rtn:bits=8,group=16")
    assert done.code == 0, done.err
    assert kept(tmp_path / "out", "config.json")["quantization_config"]["format_version"] == 1
    assert "activations" not in kept(tmp_path / "out", "plan.json")
    assert len(kept(tmp_path / "out", "evidence.json")["rows"]) == 2


def test_what_is_loaded_runs_what_was_evaluated(dynamic: Path, tiny_qwen2: Path) -> None:
    module = loaded(dynamic)
    packed = [m for m in module.modules() if isinstance(m, PackedLinear)]
    heads = [m for m in module.modules() if isinstance(m, PackedHead) or m is getattr(module, "lm_head", None)]
    assert all(m.inputs is not None for m in packed if m not in heads)
    with torch.inference_mode():
        found = module(TOKENS).logits
        assert torch.allclose(found, from_decoded(dynamic, tiny_qwen2), atol=1e-4)
        for member in packed:
            member.input_spec = None
        assert not torch.allclose(module(TOKENS).logits, found, atol=1e-3)


def test_evaluating_again_gives_the_row(dynamic: Path, tiny_qwen2: Path, sentences: Path) -> None:
    done = layerwise(
        "evaluate", dynamic, "--dense", tiny_qwen2, "--evaluate", sentences, "--sequences", "8", "--length", "32",
        "--activations", "token_int:bits=8", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["activations"]["kl"] < 0.2 * done.json["artifact"]["kl"], "8 bits beside the artifact's own 4"
    shown = layerwise(
        "evaluate", dynamic, "--dense", tiny_qwen2, "--evaluate", sentences, "--sequences", "8", "--length", "32",
        "--activations", "token_int:bits=8",
    )  # fmt: skip
    assert "quantized activations" in shown.out


def test_measured_ranges_are_stored_and_run(static: tuple[Path, Path], tiny_llama: Path) -> None:
    out, _ = static
    artifact = open_artifact(out)
    assert artifact.inputs and all(name.startswith("model.layers.") for name in artifact.inputs)
    names = artifact.stored_inputs(min(artifact.inputs))
    assert [name.rpartition(".")[2] for name in names] == ["input_scale", "input_zero", "input_group"]
    assert not set(names) & set(artifact.plain)
    assert kept(out, "plan.json")["predicted"]["bytes"] == artifact.size <= kept(out, "plan.json")["budget"]["bytes"]
    with torch.inference_mode():
        assert torch.allclose(loaded(out)(TOKENS).logits, from_decoded(out, tiny_llama), atol=1e-4)


def test_saving_again_keeps_the_grids(static: tuple[Path, Path], tmp_path: Path) -> None:
    module = loaded(static[0])
    module.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    with torch.inference_mode():
        again = loaded(tmp_path / "again")(TOKENS).logits
        assert torch.allclose(again, module(TOKENS).logits, atol=1e-5)


def test_a_plan_carries_the_setting(
    static: tuple[Path, Path], tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    out, work = static
    done = compress(
        tiny_llama, tmp_path / "out", sentences, "--plan", out / "plan.json", "--techniques", "awq+rtn,rtn",
        "--no-baseline", "--work", work,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    plan = kept(out, "plan.json")
    plan["activations"] = "rtn:bits=4"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    wrong = compress(tiny_llama, tmp_path / "no", sentences, "--plan", tmp_path / "plan.json", "--work", work)
    assert wrong.code != 0 and "impossible setting of activations" in wrong.err


def test_damaged_grids_are_refused(static: tuple[Path, Path], tmp_path: Path) -> None:
    from shutil import copytree

    from layerwise.errors import InputError

    copytree(static[0], tmp_path / "out")
    config = kept(tmp_path / "out", "config.json")
    sites = config["quantization_config"]["sites"]
    site = next(name for name in sites if "inputs" in sites[name])
    table = next(name for name in sites if "inputs" not in sites[name])
    for change, message in (
        ({site: {**sites[site], "inputs": {**sites[site]["inputs"], "columns": 7}}}, "but a grid for 7"),
        ({site: {**sites[site], "inputs": {"form": "token", "bits": 1}}}, "2 to 8 bits"),
        ({site: {**sites[site], "inputs": 3}}, "cannot have quantized inputs"),
        ({table: {**sites[table], "inputs": sites[site]["inputs"] | {"columns": 64}}}, "too little"),
    ):
        changed = {**config, "quantization_config": {**config["quantization_config"], "sites": {**sites, **change}}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            open_artifact(tmp_path / "out")
    older = {**config, "quantization_config": {**config["quantization_config"], "format_version": 1}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match="format version 1"):
        open_artifact(tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("int8", "does not exist"), ("gptq:bits=4", "quantizes no activations"), ("token_int:bits=16", "from 2 to 8")],
)
def test_a_wrong_setting_is_one_sentence(
    tiny_qwen2: Path, sentences: Path, tmp_path: Path, setting: str, message: str
) -> None:
    done = compress(tiny_qwen2, tmp_path / "out", sentences, "--uniform", "rtn:bits=8", "--activations", setting)
    assert done.code != 0 and message in done.err and len(done.sentences) == 1
    assert not (tmp_path / "out").exists()


def test_static_ranges_are_not_measured_by_evaluate(dynamic: Path, tiny_qwen2: Path, sentences: Path) -> None:
    done = layerwise("evaluate", dynamic, "--dense", tiny_qwen2, "--evaluate", sentences, "--activations", "dgq:bits=8")
    assert done.code != 0 and "to compress" in done.err
