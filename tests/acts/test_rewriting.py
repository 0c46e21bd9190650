"""Rewrites in the whole job: alternatives at the block, what changes beside the sites, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layerwise
from layerwise.acts.kept import block_node, size_range
from layerwise.acts.prepare import Options
from layerwise.acts.rewriting import AS_IS, chain_of, chained, chains, encoder_of
from layerwise.compress import Result, plan_only
from layerwise.errors import InputError
from layerwise.network.network import open_network
from layerwise.plan.tree import Candidate, Choice, Leaf, Sum

SMALL: dict[str, Any] = {"sequences": 48, "length": 32, "threads": 1, "workers": 1, "baseline": False}
MIXED = ("rtn:bits=3,group=32", "awq+rtn:bits=3,group=32")


def job(model: Path, out: Path, text: Path, **options: Any) -> Result:
    return layerwise.compress(model, out, calibrate=str(text), **(SMALL | options))


def plan_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "plan.json").read_text())
    return found


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = layerwise.load(folder).eval()(tokens).logits.float()
    return found


def test_recipes_come_apart_and_together() -> None:
    assert chain_of("gptq:bits=3,group=64") == AS_IS
    assert chain_of("awq:steps=5+gptq:bits=3,group=64") == "awq:steps=5"
    assert encoder_of("awq+gptq:bits=3,group=64") == "gptq:bits=3,group=64"
    assert chained("awq", "rtn:bits=8,group=0") == "awq+rtn:bits=8,group=0"
    assert chains(["rtn", "awq+rtn", "awq+gptq", "awq:steps=5+rtn"]) == ("awq", "awq:steps=5")


def test_the_range_of_sizes_counts_one_alternative() -> None:
    def leaf(*sizes: int) -> Leaf:
        return Leaf("a", tuple(Candidate("rtn", size, 0.0) for size in sizes))

    choice = Choice("block", (("as is", Sum("block", (leaf(5, 9),))), ("awq", Sum("block", (leaf(4, 8),)))))
    assert size_range(Sum("network", (choice, leaf(1, 2)))) == (5, 11)
    assert block_node("block", []) == Choice("block", ())


@pytest.mark.parametrize("network", ["tiny_llama", "tiny_gpt2"])
def test_a_uniform_rewrite_rewrites_every_block(
    network: str, sentences: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(network)
    done = job(model, tmp_path / "out", sentences, uniform="awq+rtn:bits=8,group=32")
    blocks = open_network(model).tree.blocks
    assert done.allocation.choices == dict.fromkeys(blocks, "awq") == plan_of(done.out)["blocks"]
    assert done.evidence["rows"][1]["quality"]["kl"]["value"] < 1e-2
    dense, written = load_file(model / "model.safetensors"), load_file(done.out / "model.safetensors")
    norms = [n for n in written if "norm" in n or ".ln_" in n]
    changed = [n for n in norms if not torch.allclose(written[n].float(), dense[n].float(), rtol=1e-2)]
    assert changed
    assert not any("ln_f" in n or n == "model.norm.weight" for n in changed)
    # What is stored computes what the dense network does: the norms and the linears were rewritten alike.
    change = (logits(done.out) - logits(model)).norm() / logits(model).norm()
    assert float(change) < 0.1


def test_a_plan_chooses_among_alternatives_and_is_read_again(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = job(tiny_llama, tmp_path / "a", sentences, techniques=MIXED, budget="4.4bpw", work=str(tmp_path / "work"))
    plan = plan_of(done.out)
    assert set(plan["blocks"]) == set(open_network(tiny_llama).tree.blocks)
    for site, entry in plan["sites"].items():
        block = next((b for b in plan["blocks"] if site.startswith(f"{b}.")), None)
        assert chain_of(entry["recipe"]) == (plan["blocks"][block] if block else AS_IS)
    # Another block's alternative by hand, from the same work folder.
    for block in plan["blocks"]:
        plan["blocks"][block] = "awq"
    for site, entry in plan["sites"].items():
        if any(site.startswith(f"{b}.") for b in plan["blocks"]):
            entry["recipe"] = "awq+rtn:bits=3,group=32" if "mlp" in site else "awq+dense"
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    edited = job(
        tiny_llama, tmp_path / "b", sentences, techniques=MIXED, work=str(tmp_path / "work"),
        plan=str(tmp_path / "edited.json"),
    )  # fmt: skip
    assert set(edited.allocation.choices.values()) == {"awq"}
    assert edited.applied.bytes == (edited.out / "model.safetensors").stat().st_size


def test_runs_of_a_rewrite_are_alike_and_resume(tiny_mistral: Path, sentences: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options: dict[str, Any] = {"techniques": MIXED, "budget": "4.4bpw"}
    first = job(tiny_mistral, tmp_path / "a", sentences, **options)
    job(tiny_mistral, tmp_path / "b", sentences, work=str(work), **options)
    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if '"candidates/model.layers.1"' in line) + 1
    (work / "journal.jsonl").write_text("".join(lines[:kept]))
    resumed = job(tiny_mistral, tmp_path / "c", sentences, work=str(work), **options)
    for name in ("model.safetensors", "plan.json"):
        assert (first.out / name).read_bytes() == (resumed.out / name).read_bytes()


def test_kept_sites_stay_at_16_bits_in_a_rewritten_block(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    options = Options(
        str(tiny_llama), calibrate=str(sentences), techniques=MIXED, budget="8bpw", keep=("q_proj",),
        work=str(tmp_path / "work"), sequences=48, length=32, threads=1, workers=1, baseline=False,
    )  # fmt: skip
    plan = plan_only(options)
    assert all("dense" in s.recipe for name, s in plan.sites.items() if "q_proj" in name)


def test_a_rewrite_alone_leaves_tables_without_it(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    done = job(tiny_gpt2, tmp_path / "out", sentences, techniques=("awq+rtn:bits=4,group=16",), budget="9bpw")
    plan = plan_of(done.out)
    assert not any("awq" in entry["recipe"] for site, entry in plan["sites"].items() if ".h." not in site)


def test_a_network_without_a_place_is_refused(
    tiny_bert: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.acts.rewriting.find_folds", lambda *_: ())
    with pytest.raises(InputError, match="awq finds no place"):
        job(tiny_bert, tmp_path / "out", sentences, uniform="awq+rtn:bits=4,group=16")
    assert not (tmp_path / "out").exists()


def test_a_block_without_a_place_is_left_as_it_is(
    tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.acts.rewriting import Rewriter

    original = Rewriter.folds
    monkeypatch.setattr(Rewriter, "folds", lambda self, block: original(self, block) if block.endswith("1") else ())
    done = job(tiny_llama, tmp_path / "out", sentences, uniform="awq+rtn:bits=4,group=16")
    assert done.allocation.choices == {"model.layers.1": "awq"}
    assert done.allocation.sites["model.layers.0.mlp.up_proj"].recipe == "rtn:bits=4,group=16"
    assert done.evidence["checks"]["awq left out of"] == "model.layers.0"
