"""``layerwise search`` and ``layerwise bench`` of a search: files in, a network out, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.nas.pictures import bars
from typer.testing import CliRunner

import layerwise
from layerwise.cli.main import app
from layerwise.errors import InputError
from layerwise.jobs.bench import Bench, bench, check
from layerwise.jobs.searching import Searching, labelled, search, usual_patch
from layerwise.nas.task import judged
from layerwise.trials import searches as trials

SMALL = ("--widths", "16,32", "--depths", "1,2", "--ratios", "1,2", "--patch", "4", "--limit", "0.6")
SHORT = (*SMALL, "--batch", "8", "--steps", "10")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(images to search on as bytes, held-out images as floats normalised alike)."""
    given, unseen = bars(120), bars(40, seed=9)
    whole = ((given.pixels[:, 0] + 1) * 80).clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / "train.npz", images=whole.numpy(), labels=given.labels.numpy().astype(np.uint8))
    also = ((unseen.pixels[:, 0] + 1) * 80).clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / "test.npz", images=also.numpy(), labels=unseen.labels.numpy())
    return tmp_path / "train.npz", tmp_path / "test.npz"


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["search", *map(str, words)])
    if isinstance(done.exception, InputError):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_bytes_to_a_network_that_opens(files: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = files
    code, said = run("random_search:candidates=2", tmp_path / "OUT", "--images", train, "--evaluate", test, *SHORT)
    assert code == 0 and "held-out images" in said
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    images, normal = labelled(str(train))
    assert config["search"]["mean"] == normal.mean and abs(float(images.pixels.mean())) < 1e-4
    module, unseen = layerwise.searched(tmp_path / "OUT"), labelled(str(test), None, normal)[0]
    assert f"{judged(module, unseen)[0]:.4f}" in said
    network = layerwise.open(tmp_path / "OUT", (images.pixels, images.labels))
    assert network.tree.sites
    with pytest.raises(InputError, match="opened with its inputs"):
        layerwise.open(tmp_path / "OUT")


def test_equal_runs_give_equal_files_and_json(files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("A", "B"):
        code, said = run("tangle_nas", tmp_path / name, "--images", files[0], "--json", *SHORT)
        assert code == 0 and json.loads(said)["judged_on"] == "validation images"
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "A" / file).read_bytes() == (tmp_path / "B" / file).read_bytes()


def test_labels_may_lie_in_another_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    given, _ = labelled(str(files[0]))
    save_file({"images": given.pixels}, tmp_path / "pixels.safetensors")
    save_file({"labels": given.labels}, tmp_path / "labels.safetensors")
    read, normal = labelled(str(tmp_path / "pixels.safetensors"), str(tmp_path / "labels.safetensors"))
    assert torch.equal(read.pixels, given.pixels) and torch.equal(read.labels, given.labels) and normal.deviation == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("gptq",), "searches no architecture"),
        (("neaz",), "does not exist"),
        (("neas:members=9",), "from 1 to 4"),
        (("neas", "--limit", "0"), "--limit"),
        (("neas", "--limit", "0.01"), "at least"),
        (("neas", "--steps", "0"), "--steps must be at least 1"),
        (("neas", "--widths", "a"), "whole numbers"),
        (("neas", "--widths", "10"), "multiples"),
        (("neas", "--patch", "3"), "divisor"),
        (("neas", "--threads", "0"), "--threads"),
        (("neas", "--labels", "none.npz"), "none.npz"),
        (("neas", "--evaluate", "none.npz"), "none.npz"),
    ],
)
def test_mistakes_are_refused_at_once(
    files: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...], says: str
) -> None:  # fmt: skip
    method, *rest = words
    code, said = run(method, tmp_path / "OUT", "--images", files[0], *SMALL, *rest)
    assert code == 2 and says in said and not (tmp_path / "OUT").exists()


def test_files_that_do_not_fit_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    given, _ = labelled(str(files[0]))
    save_file({"images": given.pixels}, tmp_path / "bare.safetensors")
    save_file({"images": given.pixels[:, :, :4].contiguous(), "labels": given.labels}, tmp_path / "flat.safetensors")
    save_file({"images": given.pixels[:20], "labels": given.labels[:20]}, tmp_path / "few.safetensors")
    for file, says in (("bare", "no entry named labels"), ("flat", "square"), ("few", "at least 40")):
        with pytest.raises(InputError, match=says):
            search(Searching("neas", str(tmp_path / "OUT"), str(tmp_path / f"{file}.safetensors"), patch=4))
    with pytest.raises(InputError, match="also in"):
        search(Searching("neas", str(tmp_path / "OUT"), str(files[0]), evaluate=str(files[0]), patch=4))
    (tmp_path / "OUT").mkdir()
    with pytest.raises(InputError, match="--force"):
        search(Searching("neas", str(tmp_path / "OUT"), str(files[0])))
    shutil.rmtree(tmp_path / "OUT")


def test_the_usual_patch_is_about_a_fourth() -> None:
    assert [usual_patch(side) for side in (8, 28, 32, 64, 7)] == [2, 7, 8, 16, 1]


def test_bench_holds_a_search_against_its_rivals(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    study = trials.Study(steps=6, batch=8, limit=0.6, widths=(16, 32), depths=(1, 2), ratios=(1, 2))
    monkeypatch.setattr(
        "layerwise.jobs.bench.search_trials", lambda *asked: trials.search_trials(*asked, study=study)
    )  # fmt: skip
    with pytest.raises(InputError, match="labelled images"):
        check(Bench("tangle_nas"))
    found = bench(Bench("tangle_nas", calibrate=str(files[0]), evaluate=str(files[1]), seeds=(0,), workers=1))
    assert {row.metric for row in found.rows} == set(trials.METRICS)
    assert {row.baseline.recipe for row in found.rows} == {
        "random_search", "tangle_nas:learn=none", "tangle_nas:learn=train"
    }  # fmt: skip
    assert all(row.setting == "tangle_nas" and row.data and row.bytes > 0 for row in found.rows)
