"""``layerwise compare``: every technique as if it were alone, within the same bytes, and what is refused."""

from __future__ import annotations

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
    from dataclasses import replace

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--techniques": "rtn"}, ("at least two techniques",)),
        ({"--techniques": ""}, ("at least two techniques",)),
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
