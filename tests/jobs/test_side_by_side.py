"""``layerwise compare``: every technique as if it were alone, within the same bytes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.command import SMALL, layerwise

from layerwise.acts.prepare import Options
from layerwise.compress import plan_only
from layerwise.jobs.side_by_side import TOGETHER, Comparison, side_by_side

TECHNIQUES = ("rtn", "gptq:bits=4,group=64", "awq:steps=3+rtn:bits=4,group=32")


@pytest.fixture(scope="module")
def options(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    work = tmp_path_factory.mktemp("compare") / "work"
    return Options(
        str(tiny_llama), budget="6.5bpw", techniques=TECHNIQUES, calibrate=str(sentences), sequences=48, length=32,
        threads=1, workers=1, work=str(work),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(options: Options) -> Comparison:
    return side_by_side(options)


def test_every_plan_keeps_the_budget(found: Comparison) -> None:
    assert [method.technique for method in found.methods] == [*TECHNIQUES, TOGETHER]
    assert all(0.9 * found.budget < method.bytes <= found.budget for method in found.methods)
    assert found.dense["kl"] == 0 and all(method.metrics["kl"] > 0 for method in found.methods)
    assert all(method.seconds > 0 for method in found.methods)


def test_the_joint_plan_predicts_no_more_damage_than_any_other(found: Comparison) -> None:
    *single, joint = found.methods
    assert joint.predicted <= min(method.predicted for method in single) * (1 + 1e-4)
    assert joint.seconds >= max(method.seconds for method in single)


def test_a_technique_gets_only_its_own_recipes(found: Comparison) -> None:
    own = {"rtn": {"rtn"}, "gptq": {"gptq", "rtn"}, "awq": {"awq+rtn", "awq+dense", "rtn"}}
    for method in found.methods[:-1]:
        name = method.technique.partition(":")[0]
        assert set(method.sites) <= own[name] | {"dense"}, method
    assert sum(found.methods[0].sites.values()) == sum(found.methods[-1].sites.values())


def test_a_technique_plans_as_it_would_alone(found: Comparison, options: Options, tmp_path: Path) -> None:
    alone = plan_only(replace(options, techniques=TECHNIQUES[:1], work=str(tmp_path / "alone")))
    assert found.methods[0].predicted == pytest.approx(alone.predicted.damage, rel=1e-6)
    assert found.methods[0].bytes == alone.predicted.bytes


def test_another_budget_reuses_the_work_folder(found: Comparison, options: Options) -> None:
    done = layerwise(
        "compare", options.model, "--budget", "7bpw", "--techniques", ",".join(TECHNIQUES), "--calibrate",
        options.calibrate, *SMALL, "--work", str(options.work),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "all together" in done.out and "dense" in done.out and "KL" in done.out


def test_seeds_are_averaged_and_say_how_far_they_lie_apart(found: Comparison, options: Options) -> None:
    few = replace(options, techniques=TECHNIQUES[:2], work=None)
    both = side_by_side(few, seeds=(0, 1))
    alone = [side_by_side(replace(few, seed=seed)) for seed in (0, 1)]
    assert both.seeds == (0, 1)
    for place, method in enumerate(both.methods):
        values = [run.methods[place].metrics["kl"] for run in alone]
        assert method.metrics["kl"] == pytest.approx(sum(values) / 2)
        assert method.spread["kl"] == pytest.approx(abs(values[0] - values[1]) / 2) and method.spread["kl"] > 0
        assert method.bytes == max(run.methods[place].bytes for run in alone)
    assert sum(method.best_at for method in both.methods) >= 2
    assert all(method.spread["kl"] == 0 for method in found.methods)


def test_without_names_the_usual_techniques_that_reach_the_budget(tiny_llama: Path, sentences: Path) -> None:
    done = layerwise(
        "compare", tiny_llama, "--budget", "4.6bpw", "--calibrate", sentences, *SMALL, "--seeds", "0,1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert all(name in done.out for name in ("trellis", "two_sided", "gptq", "hqq", "rtn", "±", "best at"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--techniques": "rtn"}, ("at least two techniques",)),
        ({"--techniques": "", "--budget": "1.9bpw"}, ("can reach 1.9bpw", "--techniques")),
        ({"--seeds": "0,0"}, ("--seeds", "different whole numbers")),
        ({"--techniques": "rtn,rtn"}, ("rtn", "twice")),
        ({"--techniques": "rtn,gptk"}, ("'gptk'", "did you mean")),
        ({"--techniques": "rtn,pareto"}, ("pareto", "not encoder")),
        ({"--techniques": "rtn,gptq:bits=8"}, ("gptq:bits=8", "below the smallest file")),
        ({"--budget": "1bpw"}, ("rtn", "below the smallest file")),
        ({"--budget": "4"}, ("has no unit",)),
        ({"--evaluate": "nowhere.txt"}, ("nowhere.txt",)),
    ],
)
def test_mistakes_end_in_one_sentence(
    change: dict[str, str], words: tuple[str, ...], tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    given = {"--techniques": "rtn,gptq", "--budget": "5bpw", "--calibrate": str(sentences), **change}
    work = tmp_path / "work"
    options = [word for pair in given.items() for word in pair]
    done = layerwise("compare", tiny_llama, *options, *SMALL, "--work", work)
    assert done.code == 2, (done.out, done.err)
    assert len(done.sentences) == 1, done.err
    assert all(word in done.sentences[0] for word in words), done.err
    assert not work.exists()
