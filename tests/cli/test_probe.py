"""``layerwise probe``: the table, the page, the list, and what it refuses before it works."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import Done, layerwise, tree_of

SMALL = ("--sequences", "48", "--length", "32", "--threads", "1")


def test_a_table_a_sentence_and_a_page(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    page = tmp_path / "probe.html"
    done = layerwise("probe", tiny_llama, "block_influence", "--calibrate", sentences, *SMALL, "--out", page)
    assert done.code == 0, done.err
    assert "model.layers.1" in done.out and "turns states least" in done.out and str(page) in done.out
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text and "<script" not in text and "default-src 'none'" in text
    assert [p.name for p in tmp_path.iterdir()] == ["probe.html"]
    assert layerwise("probe", tiny_llama, "spectrum-alpha", "--out", page, "--force").code == 0
    assert page.read_text(encoding="utf-8") != text


def test_json_holds_every_figure(tiny_llama: Path) -> None:
    done = layerwise("probe", tiny_llama, "spectrum_alpha:smallest=20", "--json")
    assert done.code == 0 and done.err == ""
    found = done.json
    assert found["probe"] == "spectrum_alpha:smallest=20"
    assert {"place", "alpha", "traps", "ERG gap"} <= set(found["rows"][0])
    assert [r["place"] for r in found["rows"]][-1] == "lm_head"


def test_the_seed_reaches_the_control(tiny_llama: Path) -> None:
    one, same, other = (layerwise("probe", tiny_llama, "spectrum_alpha", "--json", *s).json
                        for s in (("--seed", "1"), ("--seed", "1"), ("--seed", "2")))  # fmt: skip
    assert one == same and one["rows"] != other["rows"]
    assert one["rows"][0]["alpha"] == other["rows"][0]["alpha"]


def test_the_list_says_what_each_does() -> None:
    done = layerwise("probe", "--list")
    assert done.code == 0
    for name in ("spectrum_alpha", "block_influence", "ShortGPT", "weights", "text"):
        assert name in done.out
    assert all(row["does"].endswith(".") for row in layerwise("probe", "--list", "--json").json)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("MODEL and PROBE", "--list")),
        (("MODEL",), ("MODEL and PROBE",)),
        (("MODEL", "spectrum_alfa"), ("'spectrum_alfa' does not exist", "spectrum_alpha", "block_influence")),
        (("MODEL", "gptq"), ("'gptq' is no probe", "spectrum_alpha")),
        (("MODEL", "spectrum_alpha:estimator=magic"), ("estimator", "ks, hill")),
        (("MODEL", "spectrum_alpha:shares=1"), ("no option 'shares'", "share")),
        (("nowhere", "spectrum_alpha"), ("there is no directory nowhere",)),
        (("nowhere", "block_influence"), ("there is no directory nowhere",)),
        (("MODEL", "spectrum_alpha", "--calibrate", "empty.txt"), ("reads weights only", "--calibrate")),
        (("MODEL", "block_influence", "--calibrate", "empty.txt"), ("empty.txt is empty",)),
        (("MODEL", "block_influence", "--calibrate", "no.txt"), ("no.txt",)),
        (("MODEL", "block_influence", "--calibrate", "short.txt"), ("short.txt", "too short")),
        (("MODEL", "block_influence", "--length", "4"), ("--length", "from 8")),
        (("MODEL", "block_influence", "--sequences", "0"), ("--sequences", "from 4")),
        (("MODEL", "block_influence", "--threads", "0"), ("--threads", "from 1")),
        (("MODEL", "block_influence", "--device", "tpu9"), ("no device 'tpu9'",)),
        (("MODEL", "spectrum_alpha", "--seed", "-1"), ("seed", "at least 0")),
        (("MODEL", "spectrum_alpha", "--out", "empty.txt"), ("empty.txt exists", "--force")),
        (("MODEL", "spectrum_alpha", "--out", "."), ("is a folder", "probe.html")),
        (("MODEL", "spectrum_alpha", "--out", "no/such/page.html"), ("does not exist", "page.html")),
        (("MODEL", "spectrum_alpha", "--ouut", "page.html"), ("--ouut", "--out")),
    ],
    ids=lambda value: " ".join(value[1:]) if value and value[0] in ("MODEL", "nowhere") else None,
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.\n")
    before = tree_of(tmp_path)
    done: Done = layerwise("probe", *(str(tiny_llama) if a == "MODEL" else a for a in arguments))
    assert done.code == 2, (done.out, done.err)
    assert len(done.sentences) == 1 and "Traceback" not in done.err, done.err
    for word in words:
        assert word in done.sentences[0], done.sentences[0]
    assert tree_of(tmp_path) == before
