"""What each block is worth: the figures are those of the networks they speak of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import layerwise
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import first_tokens
from layerwise.cli.main import app
from layerwise.jobs.blocks import KINDS, measure_blocks, steps_of
from layerwise.network.arranged import arranged, in_memory
from layerwise.network.arrangement import Arrangement, Step
from layerwise.network.stack import Stack
from layerwise.probe.measurement import Measurement


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    work = tmp_path_factory.mktemp("blocks") / "w"
    made = layerwise.calibrate(
        layerwise.open(tiny_llama), str(sentences), work=work, sequences=48, length=32, threads=1
    )
    yield made
    made.journal.close()


@pytest.fixture(scope="module")
def measured(calibration: Calibration) -> Measurement:
    return measure_blocks(calibration, 512)


def test_each_figure_is_that_of_the_network_run_so(calibration: Calibration, measured: Measurement) -> None:
    network = calibration.network
    batches = first_tokens(calibration.splits.judge, 512)
    dense = in_memory(network)
    for index in range(2):
        for kind in KINDS:
            steps = steps_of(kind, index, 2)
            if steps is None:
                assert measured.column(kind)[network.tree.blocks[index]] is None
                continue
            whole = Arrangement((*(Step((i,)) for i in range(index)), *steps))
            module = in_memory(arranged(network, whole))
            kl, likelihood, terms, predicted = 0.0, 0.0, 0, 0
            for batch in batches:
                with torch.inference_mode():
                    p, q = (m(batch.tokens, use_cache=False).logits.log_softmax(-1) for m in (dense, module))
                kl += float((p.exp() * (p - q)).sum(-1).double().sum())
                terms += batch.tokens.numel()
                likelihood -= float(q[:, :-1].gather(-1, batch.tokens[:, 1:, None]).double().sum())
                predicted += batch.tokens[:, 1:].numel()
            place = network.tree.blocks[index]
            assert measured.column(kind)[place] == pytest.approx(kl / terms, rel=1e-3, abs=1e-6)
            assert measured.column(f"{kind}: perplexity")[place] == pytest.approx(
                math.exp(likelihood / predicted), rel=1e-3
            )


def test_removals_agree(calibration: Calibration) -> None:
    """``removal.py`` streams the same figure from disk."""
    from layerwise.acts.removal import measure_removals

    removed = [m.damage for m in measure_removals(calibration)]
    again = measure_blocks(calibration, 4096)
    assert list(again.column("skip").values()) == pytest.approx(removed, rel=1e-4, abs=1e-6)


def test_bytes_are_those_of_the_checkpoint(calibration: Calibration, measured: Measurement) -> None:
    network = calibration.network
    inside = sum(
        network.stored.place(n).nbytes for n, _ in network.module.named_parameters() if n.startswith("model.layers.0.")
    )
    assert measured.column("bytes")["model.layers.0"] == inside / 1e6
    assert sum(measured.column("time").values()) == pytest.approx(100)  # type: ignore[arg-type]


def test_an_encoder_has_no_perplexity(tiny_bert: Path, sentences: Path) -> None:
    from layerwise.library import measure_depth

    found = measure_depth(
        layerwise.open(tiny_bert), tokens=256, text=str(sentences), sequences=96, length=16, threads=1
    )
    assert [c.name for c in found.columns] == [*KINDS, "bytes", "time"]
    assert all(isinstance(v, float) and v > 0 for v in found.column("skip").values())


def test_the_verb(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    def run(*more: str) -> Any:
        given = ["--calibrate", str(sentences), "--sequences", "48", "--length", "32", "--threads", "1", *more]
        return CliRunner().invoke(app, ["depth", str(tiny_gpt2), *given])

    found = run("--json", "--html", str(tmp_path / "depth.html"))
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert [row["place"] for row in value["rows"]] == ["transformer.h.0", "transformer.h.1"]
    assert value["rows"][0]["skip"] > 0 and value["rows"][1]["swap"] is None
    page = (tmp_path / "depth.html").read_text()
    assert "What each block is worth" in page and "<script" not in page
    assert "exists" in str(run("--html", str(tmp_path / "depth.html")).exception)


def test_it_is_refused_for_what_has_no_blocks_to_move(tiny_llama: Path) -> None:
    network = arranged(layerwise.open(tiny_llama), Arrangement(steps_of("loop", 0, 2) or ()))
    with pytest.raises(layerwise.InputError, match="arranged already"):
        Stack(network)
