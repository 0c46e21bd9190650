"""The whole job, end to end, on a tiny network of every architecture."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.command import compress, layerwise, tree_of
from torch import Tensor, nn

FILES = {
    "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "plan.json", "evidence.json",
    "report.html", "README.md",
}  # fmt: skip
NETWORKS = (
    "tiny_llama", "tiny_qwen2", "tiny_mistral", "tiny_gpt2", "tiny_bert", "tiny_bert_classifier", "tiny_masked",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run of ``layerwise compress``."""

    model: Path
    out: Path
    budget: int
    evidence: dict[str, Any]
    plan: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(f.stat().st_size for f in self.out.rglob("*.safetensors"))


def finished(model: Path, out: Path, text: Path, *options: str | Path) -> Run:
    done = compress(model, out, text, *options)
    assert done.code == 0, done.err
    evidence, plan = (json.loads((out / name).read_text()) for name in ("evidence.json", "plan.json"))
    return Run(model, out, evidence["budget"]["bytes"], evidence, plan)


def middle(model: Path, text: Path) -> int:
    """A budget in the middle (by ratio) of what the network can reach, in bytes."""
    done = compress(model, "unused", text, "--budget", "100%", "--dry-run", "--json")
    assert done.code == 0, done.err
    return int((done.json["smallest"] * done.json["largest"]) ** 0.5)


def digests(out: Path, *names: str) -> dict[str, str]:
    names = names or ("model.safetensors", "config.json", "plan.json")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="session")
def tiny_masked(build: Any, encoder_tokenizer: Any) -> Path:
    """``BertForMaskedLM``: tied table and decoder, a transform between the blocks and the head."""
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    made: Path = build(
        BertForMaskedLM, BertConfig, encoder_tokenizer, 17, max_position_embeddings=128, initializer_range=0.1, **size
    )
    return made


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs that are finished, by network; filled as tests ask for them."""
    return {}


@pytest.fixture(params=NETWORKS)
def run(
    request: pytest.FixtureRequest, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory, sentences: Path
) -> Run:
    """Each network in turn, compressed to the middle of its range. Do not write into it."""
    name = request.param
    if name not in runs:
        model = request.getfixturevalue(name)
        folder = tmp_path_factory.mktemp(name)
        runs[name] = finished(model, folder / "OUT", sentences, "--budget", f"{middle(model, sentences)}B")
        assert [p.name for p in folder.iterdir()] == ["OUT"], "the work folder goes when the run has succeeded"
    return runs[name]


def dense_module(run: Run) -> nn.Module:
    """The dense network's own class with the artifact's decoded weights: what was evaluated."""
    import transformers

    from layerwise.network.artifact import open_artifact

    artifact = open_artifact(run.out)
    module = getattr(transformers, artifact.checkpoint.architecture).from_pretrained(run.model, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(artifact.read(name))
    return module.eval()


@torch.inference_mode()
def outputs(module: nn.Module) -> Tensor:
    tokens = torch.arange(3, 51).view(3, 16)
    found = module(input_ids=tokens)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


# ---------------------------------------------------------------- every architecture


def test_size_is_as_predicted_and_within_the_budget(run: Run) -> None:
    assert run.plan["predicted"]["bytes"] == run.size <= run.budget
    plan_row = next(row for row in run.evidence["rows"] if row["name"] == "plan")
    assert plan_row["bytes"] == run.size
    assert plan_row["bpw"] == pytest.approx(8 * run.size / run.evidence["network"]["parameters"], abs=1e-3)
    assert run.size > 0.9 * run.budget, "the budget is used"


def test_everything_that_belongs_to_an_artifact_is_there(run: Run) -> None:
    from layerwise.report.evidence import read_evidence

    assert {p.name for p in run.out.iterdir()} >= FILES
    assert read_evidence(run.out / "evidence.json")["rows"]
    page = (run.out / "report.html").read_text()
    for site in run.plan["sites"]:
        assert site in page
    assert 'src="http' not in page and 'href="http' not in page  # opens without a network
    card = (run.out / "README.md").read_text()
    assert card.startswith("---") and "layerwise" in card
    assert {row["name"] for row in run.evidence["rows"]} == {"dense", "plan", "baseline"}


def test_the_baseline_is_a_uniform_setting_at_least_as_large(run: Run) -> None:
    rows = {row["name"]: row for row in run.evidence["rows"]}
    assert rows["baseline"]["bytes"] >= rows["plan"]["bytes"]
    assert rows["baseline"]["recipe"].startswith("gptq:bits=")


def test_what_is_loaded_is_what_was_evaluated(run: Run) -> None:
    import layerwise as library

    loaded = library.load(run.out, dtype=torch.float32)
    assert type(loaded).__name__ == run.evidence["network"]["class"]
    expected = outputs(dense_module(run))
    assert torch.allclose(outputs(loaded), expected, atol=1e-4 * float(expected.abs().max()))


def test_transformers_loads_it(run: Run) -> None:
    import transformers

    import layerwise as library

    kind = run.evidence["network"]["class"]
    auto = {
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
    }
    name = next((v for k, v in auto.items() if kind.endswith(k)), "AutoModel")
    loaded = getattr(transformers, name).from_pretrained(run.out).eval()
    assert torch.equal(outputs(loaded), outputs(library.load(run.out)))
    assert transformers.AutoTokenizer.from_pretrained(run.out)("the old baker")["input_ids"]


def test_evaluating_the_artifact_gives_what_the_run_reported(run: Run, sentences: Path, tmp_path: Path) -> None:
    """Same text on both sides, so the run is repeated with a held-out file of its own."""
    lines = [f"A line of its own, number {i}, counts {j} silver coins." for i in range(12) for j in range(5)]
    held_out = tmp_path / "held.txt"
    held_out.write_text("\n".join(lines))
    again = finished(
        run.model, tmp_path / "OUT", sentences, "--budget", f"{run.budget}B", "--no-baseline", "--evaluate", held_out
    )
    found = layerwise(
        "evaluate", again.out, "--dense", run.model, "--evaluate", held_out, "--length", "32", "--sequences", "96",
        "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    reported = next(row for row in again.evidence["rows"] if row["name"] == "plan")["quality"]
    for metric, value in reported.items():
        assert found.json["artifact"][metric] == pytest.approx(value["value"], rel=1e-3, abs=1e-6), metric
    assert found.json["bytes"] == again.size


def test_the_export_needs_no_layerwise(run: Run, tmp_path: Path) -> None:
    import transformers

    from layerwise.network.artifact import open_artifact

    done = layerwise("export", run.out, tmp_path / "dense", "--to", "dense")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and "layerwise" not in json.dumps(config)
    artifact = open_artifact(run.out)
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        assert torch.equal(tensor, artifact.read(name).half()), name
    kind = getattr(transformers, run.evidence["network"]["class"])
    module = kind.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    expected = outputs(dense_module(run))
    assert torch.allclose(outputs(module), expected, atol=1e-2 * float(expected.abs().max()))


def test_quality_loss_is_kept(run: Run, sentences: Path, tmp_path: Path) -> None:
    """A quarter of the loss that the middle of the range has: a larger file, within the tolerance on steering text."""
    name = run.evidence["loss"]["name"]
    measured = run.evidence["predicted"]["measured"]
    asked = f"{name}:{measured / 4:.3g}"
    found = finished(run.model, tmp_path / "OUT", sentences, "--quality-loss", asked, "--no-baseline")
    assert found.size > run.size
    assert found.evidence["predicted"]["measured"] < measured
    assert found.plan["budget"]["asked"] == asked


# ---------------------------------------------------------------- one network, every option


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sentences: Path) -> tuple[Run, Path]:
    """A run at 5 bpw and its work folder. Copy the folder before a test writes into it."""
    folder = tmp_path_factory.mktemp("kept")
    run = finished(
        tiny_llama, folder / "OUT", sentences, "--budget", "5bpw", "--no-baseline", "--work", folder / "work"
    )
    return run, folder / "work"


def test_another_budget_repeats_no_pass(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    journal = (work / "journal.jsonl").read_bytes()
    found = finished(
        run.model, tmp_path / "OUT", sentences, "--budget", "4.4bpw", "--no-baseline", "--work", work
    )  # fmt: skip
    grown = (work / "journal.jsonl").read_bytes()
    assert grown.startswith(journal)
    added = [json.loads(line)["unit"] for line in grown[len(journal) :].splitlines()]
    assert added and all(unit.startswith("refit/") for unit in added)
    assert found.size < run.size and found.plan["predicted"]["damage"] > run.plan["predicted"]["damage"]
    from_scratch = finished(run.model, tmp_path / "OUT2", sentences, "--budget", "4.4bpw", "--no-baseline")
    assert digests(found.out) == digests(from_scratch.out)


def test_the_plan_verb_plans_what_compress_does(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    options = ["--calibrate", sentences, "--sequences", "48", "--length", "32", "--threads", "1", "--workers", "1"]
    file = tmp_path / "plan.json"
    done = layerwise("plan", run.model, "--budget", "5bpw", "--work", work, "--out", file, "--json", *options)
    assert done.code == 0, done.err
    assert done.json == json.loads(file.read_text()) == run.plan
    shown = layerwise("plan", "show", file)
    assert shown.code == 0 and "5bpw" in shown.out and "gate_proj" in shown.out


def test_an_edited_plan_changes_the_artifact_there(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    plan = json.loads(json.dumps(run.plan))
    site = next(name for name, s in plan["sites"].items() if s["next_cheaper"] and ".mlp." in name)
    plan["sites"][site]["recipe"] = plan["sites"][site]["next_cheaper"]["recipe"]
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(plan))
    found = finished(run.model, tmp_path / "OUT", sentences, "--plan", edited, "--no-baseline", "--work", work)
    before, after = (load_file(r.out / "model.safetensors") for r in (run, found))
    changed = {n for n in before | after if n not in before or n not in after or not same(before[n], after[n])}
    assert changed and all(name.startswith(f"{site}.weight") for name in changed)
    assert found.plan["predicted"]["bytes"] == found.size < run.size
    again = finished(
        run.model, tmp_path / "again", sentences, "--plan", found.out / "plan.json", "--no-baseline", "--work", work
    )
    assert digests(again.out, "model.safetensors", "config.json") == digests(
        found.out, "model.safetensors", "config.json"
    )

    difference = layerwise("plan", "diff", run.out, found.out, "--json")
    assert [c["site"] for c in difference.json["sites"]] == [site]
    assert difference.json["bytes"] == found.size - run.size
    printed = layerwise("plan", "diff", run.out, found.out)
    assert printed.code == 0 and f"{len(plan['sites']) - 1} sites alike" in printed.out


def test_a_plan_may_name_a_recipe_that_the_menu_lacks(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    plan, site, recipe = json.loads(json.dumps(run.plan)), "model.layers.0.mlp.up_proj", "rtn:bits=7,group=16"
    plan["sites"][site]["recipe"] = recipe
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(plan))
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    options = ("--plan", edited, "--no-baseline", "--work", copy, "--redo", f"{site}={recipe}")
    found = finished(run.model, tmp_path / "OUT", sentences, *options)
    assert found.plan["sites"][site]["recipe"] == recipe and found.plan["predicted"]["bytes"] == found.size


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_kept_sites_stay_at_16_bits(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    options = ("--budget", "7bpw", "--no-baseline", "--work", work, "--keep", r"layers\.0\..*v_proj")
    found = finished(run.model, tmp_path / "OUT", sentences, *options)
    stored = load_file(found.out / "model.safetensors")
    weight = stored["model.layers.0.self_attn.v_proj.weight"]
    dense = load_file(run.model / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(weight, dense.half())
    assert stored["model.layers.1.self_attn.v_proj.weight"].dtype == torch.uint8


def test_a_fixed_site_gets_its_recipe(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    site = "model.layers.1.mlp.gate_proj"
    options = ("--budget", "5bpw", "--no-baseline", "--fix", f"{site}=rtn:bits=6,group=32")
    found = finished(kept[0].model, tmp_path / "OUT", sentences, *options)
    assert found.plan["sites"][site]["recipe"] == "rtn:bits=6,group=32"
    assert found.size <= found.budget


def test_redo_repeats_one_unit(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    site = "model.layers.1.mlp.gate_proj"
    options = ("--budget", "5bpw", "--no-baseline", "--work", copy, "--redo", f"{site}=rtn:bits=6,group=32")
    found = finished(run.model, tmp_path / "OUT", sentences, *options)
    assert found.plan["sites"][site]["recipe"] == "rtn:bits=6,group=32"
    units = [
        {json.loads(line)["unit"]: line for line in (folder / "journal.jsonl").read_text().splitlines()}
        for folder in (work, copy)
    ]
    assert all(unit.startswith("refit/") for unit in units[1].keys() - units[0].keys())
    assert [u for u in units[0] if units[0][u] != units[1][u]] == ["candidates/model.layers.1"]


def test_a_dry_run_writes_nothing(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = compress(tiny_llama, tmp_path / "OUT", sentences, "--budget", "5bpw", "--dry-run")
    assert done.code == 0 and not list(tmp_path.iterdir())
    for word in ("smallest file", "largest file", "budget", "time", "memory", "disk"):
        assert word in done.out
    as_json = compress(tiny_llama, tmp_path / "OUT", sentences, "--budget", "5bpw", "--dry-run", "--json").json
    assert as_json["smallest"] < as_json["budget"] < as_json["largest"] <= as_json["dense"]


def test_uniform(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    found = finished(tiny_llama, tmp_path / "OUT", sentences, "--uniform", "gptq:bits=4,group=32")
    linears = {n: s["recipe"] for n, s in found.plan["sites"].items() if "proj" in n}
    assert set(linears.values()) == {"gptq:bits=4,group=32"}
    assert found.plan["sites"]["model.embed_tokens"]["recipe"] == "rtn:bits=4,group=32"
    assert found.plan["predicted"]["bytes"] == found.size
    assert found.evidence["predicted"] is None and "no gradients" in found.plan["predicted"]["loss"]
    small = finished(
        tiny_llama, tmp_path / "OUT8", sentences, "--uniform", "gptq:bits=4,group=32", "--embeddings", "int8"
    )
    assert small.plan["sites"]["model.embed_tokens"]["recipe"] == "rtn:bits=8,group=0"


def test_a_uniform_setting_is_the_baseline_of_a_plan(tiny_bert: Path, sentences: Path, tmp_path: Path) -> None:
    """Encoded without gradients, and yet the pooler, which the loss does not reach, is kept apart as in a plan."""
    plain = finished(tiny_bert, tmp_path / "OUT", sentences, "--uniform", "gptq:bits=4,group=32")
    judged = finished(tiny_bert, tmp_path / "JUDGED", sentences, "--uniform", "two_sided:bits=4,group=32")
    assert plain.evidence["predicted"] is None and judged.evidence["predicted"]["damage"] > 0
    assert plain.plan["sites"]["pooler.dense"]["recipe"] == judged.plan["sites"]["pooler.dense"]["recipe"]


def test_a_rise_of_perplexity(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    found = finished(tiny_llama, tmp_path / "OUT", sentences, "--quality-loss", "5%", "--no-baseline")
    assert found.size < 0.3 * found.evidence["network"]["dense_bytes"]


def test_same_seed_same_bytes(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, _ = kept
    again = finished(run.model, tmp_path / "OUT", sentences, "--budget", "5bpw", "--no-baseline")
    assert digests(again.out) == digests(run.out)
    other = finished(run.model, tmp_path / "OUT1", sentences, "--budget", "5bpw", "--no-baseline", "--seed", "1")
    assert digests(other.out)["model.safetensors"] != digests(run.out)["model.safetensors"]


def test_force_replaces_an_artifact(kept: tuple[Run, Path], sentences: Path, tmp_path: Path) -> None:
    run, work = kept
    out = Path(shutil.copytree(run.out, tmp_path / "OUT"))
    (out / "stale").write_text("")
    finished(run.model, out, sentences, "--budget", "4.4bpw", "--no-baseline", "--work", work, "--force")
    assert not (out / "stale").exists() and [p.name for p in tmp_path.iterdir()] == ["OUT"]


def test_a_run_that_fails_leaves_out_absent(
    kept: tuple[Run, Path], sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, work = kept
    import layerwise.compress

    def break_down(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(layerwise.compress, "write_reports", break_down)
    with pytest.raises(OSError, match="the disk is full"):
        compress(run.model, tmp_path / "OUT", sentences, "--budget", "4.4bpw", "--no-baseline", "--work", work)
    assert not list(tmp_path.iterdir())


def test_calibrate_then_plan(tiny_bert: Path, sentences: Path, tmp_path: Path) -> None:
    """The acts one by one, on the command line."""
    small = ["--calibrate", sentences, "--sequences", "48", "--length", "32", "--threads", "1", "--workers", "1"]
    done = layerwise("calibrate", tiny_bert, "--work", tmp_path / "work", *small, "--json")
    assert done.code == 0, done.err
    sites = {row["site"] for row in done.json["candidates"]}
    assert "encoder.layer.0.attention.self.query" in sites and "embeddings.word_embeddings" in sites
    before = tree_of(tmp_path / "work")
    planned = layerwise("plan", tiny_bert, "--budget", "25%", "--work", tmp_path / "work", *small, "--json")
    assert planned.code == 0, planned.err
    assert tree_of(tmp_path / "work") == before
    shown = layerwise("inspect", tiny_bert, "--json")
    assert {row["site"] for row in shown.json["sites"]} == planned.json["sites"].keys()


def test_report_writes_the_same_page_again(kept: tuple[Run, Path], tmp_path: Path) -> None:
    out = kept[0].out
    done = layerwise("report", out, "--page", tmp_path / "again.html")
    assert done.code == 0, done.err
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()
