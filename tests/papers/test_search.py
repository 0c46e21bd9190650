"""Full text, meaning, and both; what is shipped for the latter; filters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from layerwise.errors import InputError
from layerwise.papers import meaning
from layerwise.papers.ask import TEXT_ONLY, ask
from layerwise.papers.catalogue import papers
from layerwise.papers.fulltext import by_full_text
from layerwise.papers.meaning import VARIABLE, catalogue_digest, installed_network, neighbours, pack, vectors
from layerwise.papers.search import CONSTANT, fuse

SHIPPED = Path(meaning.__file__).parent / meaning.VECTORS


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which no network is installed."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(order: list[int]) -> list[str]:
    return [papers()[i].short for i in order]


def test_a_name_comes_before_a_mention() -> None:
    assert names(by_full_text("AWQ", papers()))[0] == "AWQ"
    assert set(names(by_full_text("ternary", papers()))[:3]) == {"Ternary_Binary_Transformer", "Spectra", "PTQTP"}


def test_words_are_stemmed_and_any_may_match() -> None:
    assert names(by_full_text("quantizing", papers())) == names(by_full_text("quantized", papers()))
    assert set(by_full_text("ternary zebra", papers())) == set(by_full_text("ternary", papers()))


@pytest.mark.parametrize(
    "words", ["", "   ", '"', "AND OR NOT", "a* NEAR(b)", "short:awq", "'; DROP TABLE paper", "äöü 漢字"]
)
def test_any_text_is_a_query(words: str) -> None:
    assert set(by_full_text(words, papers())) <= set(range(187))


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([3, 1, 2]) == [3, 1, 2]
    first, second = [0, 1, 2], [2, 3]
    scores = {
        0: 1 / (CONSTANT + 1),
        1: 1 / (CONSTANT + 2),
        2: 1 / (CONSTANT + 3) + 1 / (CONSTANT + 1),
        3: 1 / (CONSTANT + 2),
    }
    assert fuse(first, second) == sorted(scores, key=lambda i: (-scores[i], i)) == [2, 0, 1, 3]


def test_vectors_are_small_and_of_this_catalogue() -> None:
    size = SHIPPED.stat().st_size
    header = json.loads(SHIPPED.read_bytes()[8 : 8 + int.from_bytes(SHIPPED.read_bytes()[:8], "little")])
    assert size <= 200_000
    assert header["__metadata__"]["catalogue"] == catalogue_digest(), "stale: run examples/embed_papers.py"
    assert header["vectors"]["dtype"] == "I8"
    assert vectors().shape == (187, 384)


def test_packing_keeps_vectors() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    assert pack(rows) == pack(rows)
    packed = pack(vectors())
    from safetensors.numpy import load

    again = load(packed)
    assert np.abs(again["vectors"] * again["scales"][:, None] - vectors()).max() <= again["scales"].max() / 2 + 1e-7


def test_neighbours_are_near_in_subject() -> None:
    near = neighbours(3)
    assert all(len(set(row)) == 3 and i not in row for i, row in enumerate(near))
    place = names(list(range(187)))
    quantizers = [i for i, paper in enumerate(papers()) if paper.family.name == "quantize"]
    same = np.mean([papers()[j].family.name == "quantize" for i in quantizers for j in near[i]])
    assert same > 0.5  # 26 of 187 by chance
    assert "HAWQ" in {place[j] for j in near[place.index("AdaQuant")] + near[place.index("APTQ")]} | {
        place[j] for j in near[place.index("Inter-layer augmented Hessian MP-PTQ")]
    }


def test_without_a_network_a_search_says_so_and_goes_on(alone: Path) -> None:
    answer = ask("exits before the last layer")
    assert answer.note == TEXT_ONLY and len(answer.entries) == 10 and not answer.one


def test_a_network_is_found_in_order(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        return folder

    assert installed_network() is None
    cached = install(alone / "cache" / "layerwise" / meaning.NETWORK)
    assert installed_network() == cached
    install(alone / "build" / "demo" / meaning.NETWORK)
    assert installed_network() == Path("build") / "demo" / meaning.NETWORK
    monkeypatch.setenv(VARIABLE, str(cached))
    assert installed_network() == cached
    with pytest.raises(InputError, match="--network must name"):
        installed_network(str(alone / "absent"))


def test_meaning_is_fused_in(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the network that answers with a stored vector: its paper is found though no word matches."""
    wanted = next(i for i, paper in enumerate(papers()) if paper.short == "Macaron Net")
    monkeypatch.setattr(meaning, "encode", lambda texts, network: np.stack([vectors()[wanted], vectors()[0]]))
    (alone / "model.safetensors").touch()
    answer = ask("zebra", network=str(alone), limit=3)
    assert answer.entries[0].name == "Macaron Net" and not answer.note


def test_a_network_of_another_kind_is_refused_or_left_out(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "encode", lambda texts, network: np.stack([vectors()[1], vectors()[1]]))
    place = alone / "build" / "demo" / meaning.NETWORK
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    with pytest.raises(InputError, match="give an all-MiniLM-L6-v2"):
        ask("exits before the last layer", network=str(place))
    answer = ask("exits before the last layer")
    assert answer.note.startswith("searched by full text alone") and answer.entries


def test_filters_narrow(alone: Path) -> None:
    everything = ask()
    assert len(everything.entries) == 187
    quantizers = ask(family="quantization").entries
    assert len(quantizers) == 26 and all(e.paper and e.paper.family.name == "quantize" for e in quantizers)
    assert all(e.paper and e.paper.year == 2024 for e in ask(year="2024").entries)
    dated, undated = ask(year="1900-2100").entries, ask(year="none").entries
    assert len(dated) + len(undated) == 187 and dated and undated
    assert all(e.status == "subject" for e in ask(status="subject").entries)
    assert len(ask("layer", limit=4).entries) == 4
    assert ask("awq", family="quantize").entries[0].name == "AWQ"


def test_the_shipped_vectors_are_those_of_the_network(minilm: Path) -> None:
    """At 4.5 bits per weight they still point where the dense network's do."""
    dense = meaning.encode([papers()[i].text for i in (0, 90, 186)], minilm)
    assert (dense * vectors()[[0, 90, 186]]).sum(1).min() > 0.95
    for paper in (papers()[60], papers()[150]):
        assert names(meaning.by_meaning(paper.title, minilm))[0] == paper.short
