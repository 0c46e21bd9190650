"""The benchmark scripts start, and the comparison of quality runs from end to end on a tiny network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = (
    "quality", "prediction", "memory", "resume", "minilm", "solver", "startup", "papers_search", "norms", "vision",
    "arranged", "decoding", "decoding_speed", "peers.run", "rotary_keys", "quantize_quality", "compress_quality",
    "latency_quality",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and script.__doc__.splitlines()[0][:30] in " ".join(shown.split())


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Sentences that the ``sentences`` fixture does not hold."""
    from tests.conftest import made_up_sentences

    file = tmp_path / "held-out.txt"
    file.write_text("\n".join(made_up_sentences(60, seed=8)) + "\n", encoding="utf-8")
    return file


def test_quality(tiny_llama: Path, sentences: Path, held_out: Path, tmp_path: Path) -> None:
    from benchmarks.quality import main

    found, page = tmp_path / "found.json", tmp_path / "found.md"
    code = main(
        [
            str(tiny_llama), "--calibrate", str(sentences), "--evaluate", str(held_out), "--exclude", str(held_out),
            "--bits", "4", "--seeds", "0", "--baselines", "rtn", "--techniques", "rtn", "--sequences", "24",
            "--length", "64", "--threads", "1", "--workers", "1", "--work", str(tmp_path / "work"), "--discard",
            "--quiet", "--json", str(found), "--markdown", str(page),
        ]
    )  # fmt: skip
    assert code == 0
    rows = json.loads(found.read_text())["rows"]
    assert [(row["scope"], row["metric"]) for row in rows] == [
        ("all bytes", "kl"), ("all bytes", "perplexity"), ("linears only", "kl"), ("linears only", "perplexity"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["bytes"] <= row["baseline bytes"]
        assert row["ratio"] == pytest.approx(row["of plan"] / row["of baseline"])
    assert rows[0]["predicted"] > 0
    assert page.read_text().count("\n| ") > len(rows)
    assert list((tmp_path / "work").iterdir()) == []


def test_only_keeps_the_named_sites() -> None:
    from benchmarks.quality import only

    from layerwise.plan.tree import Candidate, Choice, Leaf, Sum, leaves

    def leaf(name: str) -> Leaf:
        return Leaf(name, (Candidate("dense", 8, 0.0),))

    block = Choice("block", (("as is", Sum("block", (leaf("a"), leaf("b")))), ("awq", Sum("block", (leaf("a"),)))))
    left = only(Sum("network", (leaf("table"), block)), {"a"})
    assert [found.name for found in leaves(left)] == ["a", "a"]


def test_excluded_lines_leave_the_calibration_text(tmp_path: Path) -> None:
    from benchmarks.runs import texts

    calibrate, pairs = tmp_path / "calibrate.txt", tmp_path / "pairs.csv"
    calibrate.write_text("a line that stays\na line that goes\n", encoding="utf-8")
    pairs.write_text("a line that goes,another one,3.5\nfirst,second,1.0\n", encoding="utf-8")
    given = type("Given", (), {})()
    given.network, given.calibrate, given.evaluate, given.exclude, given.quiet, given.lines = (
        "tiny", str(calibrate), str(pairs), str(pairs), True, None,
    )  # fmt: skip
    with texts(given) as (filtered, evaluate):
        assert Path(filtered).read_text(encoding="utf-8") == "a line that stays\n"
        assert evaluate == str(pairs)
    assert not Path(filtered).exists()


def test_the_command_is_shown_without_where_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.tables import ROOT, command

    monkeypatch.setattr(
        "sys.argv",
        [str(ROOT / "benchmarks" / "quality.py"), "net", "--json", "a.json", "--markdown=b.md", "--bits", "4"],
    )
    assert command() == "python benchmarks/quality.py net --bits 4"


def test_average_precision() -> None:
    from benchmarks.papers_search import average_precision

    assert average_precision([4, 7, 1], {4, 1}) == (1 + 2 / 3) / 2
    assert average_precision([7], {4, 1}) == 0


def test_absent_relevance_lists_are_skipped_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import papers_search

    monkeypatch.setattr("sys.argv", ["papers_search", str(tmp_path / "listings.json")])
    assert papers_search.main() == 0
    assert capsys.readouterr().out.startswith("skipped: there are no relevance lists")


def test_quantize_quality(
    tiny_llama: Path, sentences: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.quantize_quality import main

    from benchmarks import quantize_search

    found, page, drawing = tmp_path / "found.json", tmp_path / "found.md", tmp_path / "found.svg"
    arguments = [
        str(tiny_llama), "--calibrate", str(sentences), "--evaluate", str(held_out), "--exclude", str(held_out),
        "--bits", "12", "9", "--seeds", "0", "--methods", "rtn,awq+rtn", "--allocators", "hawq", "--sequences", "24",
        "--length", "64", "--threads", "1", "--workers", "1", "--work", str(tmp_path / "work"), "--sequential",
        "--quiet", "--json", str(found), "--markdown", str(page), "--picture", str(drawing),
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = json.loads(found.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"ours", "planned", "uniform", "allocator"}
    assert {row["scope"] for row in rows} == {"all bytes", "linears only"}
    for row in rows:
        assert row["bytes"] > 0 and (row["bits"] is None or row["bpw"] <= row["bits"])
    whole = {(r["scope"], r["bits"], r["method"]): r for r in rows if r["kind"] == "ours"}
    assert (
        whole["linears only", 9, "layerwise"]["bytes"] == whole["linears only", 9, "layerwise, --sequential"]["bytes"]
    )
    assert "**" in page.read_text() and drawing.read_text().count("<polyline") > 6

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second run measures nothing again")

    first = found.read_text()
    for name in ("encode", "compare", "propagate"):
        monkeypatch.setattr(quantize_search, name, refuse)
    assert main(arguments) == 0 and found.read_text() == first


def test_families_and_latencies_share_a_search(
    tiny_llama: Path, sentences: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import compress_quality, latency_quality, quantize_search

    found, page, drawing = tmp_path / "found.json", tmp_path / "found.md", tmp_path / "found.svg"
    shared = [
        str(tiny_llama), "--calibrate", str(sentences), "--evaluate", str(held_out), "--lines", "40",
        "--only", "svd:ratio=0.5,factor_bits=4", "wanda:sparsity=0.4,bits=2,group=0", "--sequences", "24",
        "--length", "64", "--threads", "1", "--workers", "1", "--work", str(tmp_path / "work"), "--quiet",
        "--json", str(found), "--markdown", str(page), "--picture", str(drawing),
    ]  # fmt: skip
    assert compress_quality.main([*shared, "--bits", "12", "9", "--seeds", "0"]) == 0
    values = json.loads(found.read_text())
    rows = values["rows"]
    assert {row["family"] for row in rows} >= {"quantize", "prune", "factorize", "all families together"}
    assert all(0 < row["bpw"] <= row["bits"] for row in rows)
    assert "layer by layer" in page.read_text() and drawing.read_text().count("<polyline") > 3
    over = [row["prune"]["ratio"] for row in values["sites"] if row["prune"]]
    assert over and min(over) > 0

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the search is there already")

    monkeypatch.setattr(quantize_search.Search, "_measure", refuse)
    arguments = [
        "--bits", "9", "1", "--surgeons", "structured:channels=0.5", "drop_block:count=1", "--factors",
        "asvd:ratio=0.5", "--drops", "1", "--drop-bits", "9", "--rounds", "2",
    ]  # fmt: skip
    assert latency_quality.main([*shared, *arguments]) == 0
    values = json.loads(found.read_text())
    assert [(row["family"], row["variant"]) for row in values["rows"]] == [
        ("dense", "dense"), ("quantize", "9 bits"), ("quantize, int8 inputs", "9 bits, int8 inputs"),
        ("prune", "structured:channels=0.5"), ("depth", "drop_block:count=1"), ("factorize", "asvd:ratio=0.5"),
        ("depth, rounded", "1 left out, 9 bits"),
    ]  # fmt: skip
    assert list(values["left out"]) == ["1 bits"]
    dense, *others = values["rows"]
    assert dense["loss"] == 0 and all(row["loss"] > 0 for row in others)
    assert all(min(row["ms"].values()) > 0 for row in values["rows"])
    assert "no slower than a depth plan" in page.read_text() and "<polyline" in drawing.read_text()


def test_images_take_the_place_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import layerwise
    from benchmarks import compress_quality, networks
    from layerwise.calibrate.images import Images

    def blobs(seed: int, count: int) -> Images:
        drawn = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        return Images(f"{seed}", torch.randn(count, 1, 8, 8, generator=drawn) + labels[:, None, None, None], labels)

    def small(*_: object) -> object:
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
        )
        calibration = blobs(1, 240)
        return layerwise.open(module, (calibration.pixels, calibration.labels)), calibration, blobs(2, 60)

    monkeypatch.setitem(networks.NETWORKS, "small", small)
    arguments = [
        "small", "--only", "wanda:sparsity=0.4,bits=2,group=0", "--families", "prune", "--bits", "12", "9", "--seeds",
        "0", "--threads", "1", "--workers", "1", "--work", str(tmp_path), "--quiet",
    ]  # fmt: skip
    assert compress_quality.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "top1" in shown and "all families together" in shown
    monkeypatch.setitem(networks.NETWORKS, "small", lambda *_: None)
    with pytest.raises(layerwise.InputError, match="needs its files"):
        compress_quality.main(arguments)
