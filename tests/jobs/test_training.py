"""``layerwise train``: from text to a checkpoint that the other acts open, and what it refuses; its measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import layerwise

from layerwise.blueprints.decoder import Size, drawn_decoder
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.jobs.bench import Bench, bench
from layerwise.jobs.training import Pace, fit, make_tokenizer, read_corpus
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network
from layerwise.technique import find
from layerwise.trials import blueprints as blueprint_trials
from layerwise.trials.blueprints import Study, kurtosis, rounded_inputs


class Wild(find("trilm")):  # type: ignore[misc]
    """A float network at a rate that no network survives."""

    name = "wild"

    def optimisers(self, module: torch.nn.Module) -> tuple[torch.optim.Optimizer, ...]:
        return (torch.optim.SGD(module.parameters(), lr=1e30),)


SMALL = "--steps 4 --batch 2 --length 16 --width 32 --inner 44 --blocks 2 --heads 2 --vocabulary 270 --context 32"


def run(*arguments: str | Path) -> Any:
    return layerwise("train", *arguments, *SMALL.split())


def test_a_trained_network_is_opened_by_the_other_verbs(sentences: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    done = run("trilm", out, "--text", sentences, "--packed", packed)
    assert done.code == 0, done.err
    assert "held-out loss" in done.out and str(out) in done.out
    log = json.loads((out / "training.json").read_text())
    network = open_network(out)
    assert log["bytes"] == network.checkpoint.safetensors_bytes and log["parameters"] == network.tree.parameters
    assert log["packed_bytes"] == open_artifact(packed).size < log["bytes"]
    assert log["seen_tokens"] == 4 * 2 * 16 and len(log["losses"]) == 4
    assert layerwise("inspect", out, "--json").json["parameters"] == log["parameters"]
    found = layerwise(
        "evaluate", packed, "--dense", out, "--evaluate", sentences, "--sequences", "4", "--length", "16", "--json"
    )
    assert found.code == 0, found.err
    assert found.json["artifact"]["kl"] == 0
    small = ("--uniform", "rtn:bits=4,group=32", "--calibrate", str(sentences), "--sequences", "80", "--length", "16")
    made = layerwise("compress", out, tmp_path / "smaller", *small, "--threads", "1", "--workers", "1")
    assert made.code == 0, made.err


def test_the_same_command_writes_the_same_files(sentences: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("osp", tmp_path / name, "--text", sentences).code == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gptq", "OUT"], "the blueprint 'gptq' is no blueprint; the blueprints are osp, trilm"),
        (["trilmm", "OUT"], "the blueprint 'trilmm' does not exist"),
        (["trilm:rate=-1", "OUT"], "option 'rate' of trilm must be from 0 to 1"),
        (["osp", "OUT", "--packed", "PACKED"], "trains dense weights, so it has no packed form"),
        (["trilm", "OUT", "--packed", "OUT"], "--packed and OUT must be different folders"),
        (["trilm", "TAKEN"], "exists; choose another place or give --force"),
        (["trilm", "OUT", "--length", "64"], "is more than the context of 32 tokens"),
        (["trilm", "OUT", "--width", "30"], "width 30 cannot be divided into 2 heads"),
        (["trilm", "OUT", "--vocabulary", "100"], "--vocabulary must be at least 258"),
        (["trilm", "OUT", "--steps", "0"], "--steps must be at least 1"),
        (["trilm", "OUT", "--evaluate", "TEXT"], "are in the calibration text too"),
        (["trilm", "OUT", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    arguments: list[str], sentence: str, sentences: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    places = {"OUT": tmp_path / "out", "PACKED": tmp_path / "p", "TAKEN": tmp_path / "taken", "TEXT": sentences}
    given = [str(places.get(a, a)) for a in arguments]
    done = layerwise("train", *given[:2], "--text", sentences, *SMALL.split(), *given[2:])
    assert done.code == 2 and sentence in " ".join(done.err.split()), done.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_comes_apart_says_so() -> None:
    tokens = torch.arange(400) % 260
    with pytest.raises(InputError, match=r"came apart at step .*; give it a smaller rate"):
        fit(Wild(), Size(260, 32, 44, 1, 2, 16), tokens, Pace(6, 2, 8), Stopwatch())


def test_text_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens of .* text, and a window takes 129"):
        read_corpus(str(tmp_path / "short.txt"), None, 300, 128)


def test_the_tokenizer_reads_any_text_back() -> None:
    made = make_tokenizer(["a line of words", "another line of words"], 270)
    for text in ("a line", "überall, Ω and 漢字\nnew line"):
        assert made.decode(made(text)["input_ids"]) == text


def test_kurtosis_is_three_for_a_gaussian_and_grows_with_an_outlier_channel() -> None:
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert kurtosis(x) == pytest.approx(3, abs=0.1)
    x[:, 5] *= 20
    assert kurtosis(x) > 20
    assert kurtosis(torch.ones(3, 4)) == 0


def test_inputs_are_rounded_only_inside_the_context() -> None:
    network = drawn_decoder(Size(260, 32, 44, 1, 2, 16), 0).eval()
    ids = torch.arange(8).view(1, 8)
    with torch.inference_mode():
        plain = network(input_ids=ids).logits
        with rounded_inputs(network, 4):
            coarse = network(input_ids=ids).logits
        with rounded_inputs(network, 16):
            fine = network(input_ids=ids).logits
        assert torch.equal(network(input_ids=ids).logits, plain)
    assert float((coarse - plain).abs().max()) > 20 * float((fine - plain).abs().max()) > 0


@pytest.mark.parametrize("name", ["trilm", "osp"])
def test_bench_trains_and_measures(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import made_up_sentences

    lines = made_up_sentences()
    for file, part in (("text.txt", lines[:320]), ("held-out.txt", lines[320:])):
        (tmp_path / file).write_text("\n".join(part) + "\n", encoding="utf-8")
    study = Study(steps=4, batch=2, widths=(32, 64), blocks=1, vocabulary=270)
    from layerwise.jobs.bench import ROLES

    monkeypatch.setitem(ROLES, "blueprint", lambda g, t: blueprint_trials.blueprint_trials(g, t, study))
    texts = {"calibrate": str(tmp_path / "text.txt"), "evaluate": str(tmp_path / "held-out.txt")}
    asked = Bench(name, str(tiny_llama), **texts, seeds=(0,), sequences=48, length=32, workers=1)
    found = bench(asked)
    assert found.rows and all(row.network == "1 blocks trained on 256 tokens" for row in found.rows)
    assert {row.metric for row in found.rows} <= set(blueprint_trials.METRICS)
    if name == "trilm":
        wide = [r for r in found.rows if r.setting == "trilm, width 64"]
        assert any(r.baseline.bytes == r.bytes for r in wide), "nothing of the same size"
    else:
        assert len(found.rows) == 3 * len(blueprint_trials.METRICS) + 3
