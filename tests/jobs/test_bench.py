"""``layerwise bench``: each role from end to end on a tiny network, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.command import Done, layerwise

from layerwise.errors import InputError
from layerwise.jobs import bench as module
from layerwise.jobs.bench import Bench, bench, check
from layerwise.network.network import Network
from layerwise.probe.measurement import Column, Measurement
from layerwise.probe.measurement import Row as Measured
from layerwise.roles import Allocator
from layerwise.trials import probes as probe_trials
from layerwise.trials.by_loss import settings_of


@pytest.fixture(scope="module")
def given(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a small measurement on the tiny network."""
    from tests.conftest import made_up_sentences

    folder, lines = tmp_path_factory.mktemp("bench"), made_up_sentences()
    for name, part in (("text.txt", lines[:320]), ("held-out.txt", lines[320:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")
    texts = {"calibrate": str(folder / "text.txt"), "evaluate": str(folder / "held-out.txt")}
    return {"network": str(tiny_llama), **texts, "sequences": 48, "length": 32, "workers": 1}


def test_an_encoder_is_held_against_rounding_on_its_grid(given: dict[str, Any]) -> None:
    found = bench(Bench("gptq:bits=3,group=32", **given, seeds=(0, 1)))
    assert found.technique == "gptq" and found.paper == "GPTQ"
    (row,) = found.rows
    assert row.setting == "gptq:bits=3,group=32" and row.baseline.recipe == "rtn:bits=3,group=32"
    assert row.bytes == row.baseline.bytes
    assert 0 < row.value < row.baseline.value  # GPTQ with second moments, not its fall-back to rounding
    assert row.seeds == (0, 1) and row.spread > 0
    assert row.command == Bench("gptq:bits=3,group=32", **given, seeds=(0, 1)).command()
    assert "held-out.txt" in row.data


def test_where_sizes_differ_the_baseline_is_larger_or_planned_within_the_bytes(given: dict[str, Any]) -> None:
    """HQQ stores zeros in 16 bits, so round to nearest on the same grid is smaller."""
    uniform, planned = bench(Bench("hqq:bits=3,group=32", **given, seeds=(0,))).rows
    assert uniform.value == planned.value and uniform.bytes == planned.bytes
    assert uniform.baseline.bytes > uniform.bytes >= planned.baseline.bytes
    assert planned.baseline.recipe == f"rtn, planned within {uniform.bytes} bytes"
    assert planned.baseline.bytes > 0.95 * planned.bytes
    assert uniform.spread == 0


def test_a_rewrite_is_held_against_the_same_without_it(given: dict[str, Any]) -> None:
    rows = bench(Bench("awq:steps=3", **given, seeds=(0,))).rows
    assert [row.setting for row in rows] == [f"awq:steps=3+rtn:bits={bits},group=64" for bits in (4, 3, 2)]
    assert [row.baseline.recipe for row in rows] == [f"rtn:bits={bits},group=64" for bits in (4, 3, 2)]
    assert all(row.bytes == row.baseline.bytes and row.value != row.baseline.value for row in rows)


def test_an_allocator_is_held_against_a_uniform_setting(given: dict[str, Any]) -> None:
    rows = bench(Bench("pareto", **given, seeds=(0,))).rows
    assert [row.setting for row in rows] == [f"pareto over rtn, {bits} bits" for bits in (4, 3, 2)]
    assert all(row.bytes <= row.baseline.bytes * 1.005 for row in rows)
    assert rows[0].value < rows[0].baseline.value


def test_a_rewrite_of_a_network_is_exact_and_held_against_rounding_without_it(
    given: dict[str, Any], tiny_gpt2: Path
) -> None:
    exact, *rows = bench(Bench("pre_rmsnorm", **{**given, "network": str(tiny_gpt2)}, seeds=(0,))).rows
    assert exact.setting == "pre_rmsnorm, nothing rounded" and exact.metric == "largest difference of the outputs"
    assert exact.value < 1e-5 < exact.baseline.value
    assert [row.setting for row in rows] == [f"pre_rmsnorm, then rtn:bits={bits},group=64" for bits in (4, 3, 2)]
    assert all(row.metric == "kl" and row.bytes == row.baseline.bytes for row in rows)
    assert rows[0].value < rows[1].value < rows[2].value


def test_a_rewrite_that_no_checkpoint_holds_is_measured_in_memory(given: dict[str, Any], tiny_gpt2: Path) -> None:
    exact, *rows = bench(Bench("pre_crmsnorm", **{**given, "network": str(tiny_gpt2)}, seeds=(0,))).rows
    assert exact.value < 1e-5
    assert all(row.bytes < row.baseline.bytes for row in rows)


class Weighing:
    """Stands for a probe whose figure is the number of weights of a linear."""

    def measure(self, network: Network, calibration: object) -> Measurement:
        rows = tuple(Measured(s.name, (s.parameters,)) for s in network.tree.sites if s.kind == "linear")
        return Measurement("weighing", "", network.name, network.architecture, (Column("weights"),), rows, "", "")

    def __str__(self) -> str:
        return "weighing"


def test_a_probe_is_held_against_sizes_and_places(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_trials, "parse_probe", lambda text, seed=0: Weighing())
    rows = bench(Bench("spectrum_alpha", **given, seeds=(0,))).rows
    assert [row.baseline.recipe for row in rows] == ["number of weights", "place in the network"]
    assert rows[0].setting == "weighing: weights of 14 places, each stored as rtn:bits=3,group=64"
    assert 0 <= rows[0].value == rows[0].baseline.value <= 1 and rows[0].metric == probe_trials.METRIC


def test_a_generator_is_held_against_plain_decoding(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.trials import generators

    for name, value in (("PROMPTS", 2), ("PROMPT_TOKENS", 16), ("NEW_TOKENS", 12)):
        monkeypatch.setattr(generators, name, value)
    rows = bench(Bench("self_speculative:exit=1,tokens=2,floor=0", **given)).rows
    metrics = [row.metric for row in rows]
    assert metrics[:2] == ["full passes a token", "blocks run a token, over the network's"]
    assert {row.baseline.recipe for row in rows} == {"plain", "repeat the last token"}
    assert rows[0].value <= rows[0].baseline.value == 1
    rows = bench(Bench("early_exit:exit=1,confidence=0", **given)).rows
    assert rows[0].metric == metrics[1] and rows[0].value == 0.5
    named = [str(setting) for setting in generators.settings_of("early_exit")]
    assert named[-1] == "early_exit:confidence=0.0" and len(named) == 3


def test_two_blocks_are_too_few_to_rank(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"figures for 2 places of .*; 3 are needed"):
        bench(Bench("block_influence", **given, seeds=(0,)))


def test_ranks_that_agree_or_disagree_whole_have_no_disorder() -> None:
    assert probe_trials.disorder([1, 2, 3], [10, 20, 30]) == pytest.approx(0.0)
    assert probe_trials.disorder([1, 2, 3], [30, 20, 10]) == pytest.approx(0.0)
    assert probe_trials.disorder([1, 1, 1], [30, 20, 10]) == 1.0


def test_the_example_of_a_rewrite_is_one_that_it_accepts(docs_lm: Path) -> None:
    assert module._example("pre_rmsnorm")[0].endswith("docs-gpt2")
    assert module._example("hadamard")[0] == str(docs_lm) == module._example("gptq")[0]


def test_settings_come_from_the_name_the_menu_or_the_widths() -> None:
    assert settings_of("gptq:bits=3,group=32") == ["gptq:bits=3,group=32"]
    assert settings_of("gptq") == [f"gptq:bits={bits},group=64" for bits in (4, 3, 2)]
    assert settings_of("dense") == ["dense"]


def test_a_role_without_a_measure_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module.ROLES, Allocator.role)
    with pytest.raises(InputError, match=r"pareto is an allocator, which bench cannot measure; .* encoder, rewrite"):
        check(Bench("pareto"))


def test_an_installed_package_has_no_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "EXAMPLES", tmp_path)
    with pytest.raises(InputError, match="give --network DIR --calibrate TEXT --evaluate TEXT"):
        check(Bench("rtn"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gptk",), ("no technique named 'gptk'", "did you mean gptq")),
        (("gptq:bits=9",), ("'bits'", "from 2 to 8")),
        (("gptq:bitz=3",), ("no option 'bitz'",)),
        (("awq+rtn",), ("awq+rtn", "one technique")),
        (("gptq", "--seeds", "a"), ("--seeds", "whole numbers", "'a'")),
        (("gptq", "--seeds", "0,0"), ("--seeds", "different")),
        (("gptq", "--seeds", ","), ("--seeds",)),
        (("gptq", "--network", "x"), ("--network, --calibrate and --evaluate together",)),
        (("gptq", "--network", "nowhere", "--calibrate", "a.txt", "--evaluate", "b.txt"), ("nowhere",)),
        (("gptq", "--length", "2"), ("--length", "from 8")),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    refused(layerwise("bench", *arguments), words)


def refused(done: Done, words: tuple[str, ...]) -> None:
    assert done.code == 2, (done.out, done.err)
    assert len(done.sentences) == 1, done.err
    assert all(word in done.sentences[0] for word in words), done.err
