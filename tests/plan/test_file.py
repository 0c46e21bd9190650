"""The plan file: a round trip, edits, and anything that may happen to a file between writing and reading."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import InputError
from layerwise.plan.difference import difference
from layerwise.plan.file import (
    PlanBudget,
    PlanFile,
    PlanNetwork,
    Predicted,
    make_plan,
    plan_text,
    read_plan,
    write_plan,
)
from layerwise.plan.neighbours import Step
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Candidate, Choice, Leaf, Node, Sum, reached


def tree() -> Node:
    """A table and two blocks; the second block has a second alternative with its own damages."""

    def linear(site: str, factor: float) -> Leaf:
        candidates = [Candidate(f"rtn:bits={b},group=64", 1000 * b, factor * 4.0**-b) for b in (2, 3, 4, 8)]
        return Leaf(site, (*candidates, Candidate("dense", 16_000, 0.0)))

    other = Sum("layer.1", (linear("layer.1.up", 0.1), linear("layer.1.down", 0.1)))
    plain = Sum("layer.1", (linear("layer.1.up", 1.0), linear("layer.1.down", 2.0)))
    return Sum(
        "network",
        (linear("table", 0.2), linear("layer.0.up", 1.0), Choice("layer.1", (("as is", plain), ("folded", other)))),
    )


def plan_at(budget: int) -> PlanFile:
    allocation = Pareto().allocate(tree(), budget)
    return make_plan(
        tree(),
        allocation,
        PlanNetwork("tiny", "0123abcd", 40_000),
        PlanBudget("12kB", budget),
        Predicted(allocation.bytes + 512, allocation.damage, "KL per token"),
        dict.fromkeys(allocation.sites, 8000),
    )


def test_round_trip(tmp_path: Path) -> None:
    plan = plan_at(13_000)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan_text(read_plan(tmp_path / "plan.json")) == plan_text(plan)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    top = json.loads(plan_text(plan))
    assert (top["format"], top["version"], top["predicted"]["bytes"]) == ("layerwise-plan", 1, plan.predicted.bytes)


def test_neighbours_are_differences() -> None:
    site = plan_at(13_000).sites["table"]
    chosen = next(c for c in next(reached(tree(), {})).candidates if c.recipe == site.recipe)
    assert site.recipe == "rtn:bits=3,group=64"
    assert site.next_better == Step("rtn:bits=4,group=64", 1000, 0.2 * 4.0**-4 - chosen.damage)
    assert site.next_cheaper == Step("rtn:bits=2,group=64", -1000, 0.2 * 4.0**-2 - chosen.damage)
    assert plan_at(64_000).sites["table"].next_better is None
    assert plan_at(8_000).sites["table"].next_cheaper is None


def test_an_edited_plan_is_recomputed_from_the_candidates(tmp_path: Path) -> None:
    plan = plan_at(13_000)
    assert plan.choose(tree()) == Pareto().allocate(tree(), 13_000)
    top = json.loads(plan_text(plan))
    top["sites"]["table"]["recipe"] = " rtn:group=64, bits=8 "
    (tmp_path / "plan.json").write_text(json.dumps(top))
    allocation = read_plan(tmp_path / "plan.json").choose(tree())
    assert allocation.sites["table"] == Candidate("rtn:bits=8,group=64", 8000, 0.2 * 4.0**-8)


def test_blocks_and_recipes_that_the_network_does_not_have(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[dict[str, Any]], None], str]] = [
        (
            lambda top: top["blocks"].update({"layer.1": "sideways"}),
            "no alternative 'sideways'; it offers as is, folded",
        ),
        (lambda top: top["blocks"].update({"layer.7": "as is"}), "block 'layer.7'"),
        (lambda top: top["blocks"].clear(), "no entry in the plan"),
        (lambda top: top["sites"]["table"].update(recipe="rtn:bits=7,group=64"), "no candidate 'rtn:bits=7,group=64'"),
    ]
    for change, says in cases:
        top = json.loads(plan_text(plan_at(13_000)))
        change(top)
        (tmp_path / "plan.json").write_text(json.dumps(top))
        with pytest.raises(InputError, match=says):
            read_plan(tmp_path / "plan.json").choose(tree())


def test_sites_must_be_those_of_the_network() -> None:
    plan = plan_at(13_000)
    sites = list(plan.sites)
    plan.check_against(sites)
    with pytest.raises(InputError, match=r"leaves out site 'layer\.9\.up'; every"):
        plan.check_against([*sites, "layer.9.up"])
    with pytest.raises(InputError, match=f"names site {sites[-1]!r}, which the network does not have; did you mean"):
        plan.check_against([*sites[:-1], "layer.1.dawn"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda top: top.update(version=2), "install a newer layerwise"),
        (lambda top: top.update(version="1"), "whole number in 'version'"),
        (lambda top: top.update(format="other"), "not a layerwise plan"),
        (lambda top: top.update(stiles={}), "unknown entry 'stiles'; did you mean sites"),
        (lambda top: top.pop("sites"), "lacks the entry 'sites'"),
        (lambda top: top["sites"]["table"].update(recipe="rtm:bits=4"), "did you mean"),
        (lambda top: top["sites"]["table"].update(recipe="rtn:bits=99"), "impossible recipe"),
        (lambda top: top["sites"]["table"].update(recipe=4), "text in 'recipe'"),
        (lambda top: top["sites"]["table"].update(bytes=-1), "'bytes' from 0"),
        (lambda top: top["sites"]["table"].update(bytes=True), "whole number"),
        (lambda top: top["sites"]["table"].update(bytes=10**400), "bits"),
        (lambda top: top["sites"]["table"].update(damage=float("nan")), "NaN"),
        (lambda top: top["sites"]["table"].update(damage=-0.5), "at least 0"),
        (lambda top: top["sites"]["table"].update(next_better=[]), "an object in 'next_better', not a list"),
        (lambda top: top["network"].update(name="a\x1b[31m"), "cannot be printed"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    top = json.loads(plan_text(plan_at(13_000)))
    change(top)
    (tmp_path / "plan.json").write_text(json.dumps(top))
    with pytest.raises(InputError, match=says):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b'{"format": "a", "format": "b"}', "twice"),
        (b'{"version": 1e999}', "lacks|format"),
        (b'{"version": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(InputError, match=says):
        read_plan(tmp_path / "plan.json")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="is not a file"):
            read_plan(path)


def test_mutated_files_are_refused_or_read_to_the_same_effect(tmp_path: Path) -> None:
    """1000 damaged files: a plan that survives reading can be written and read again unchanged; all else InputError."""
    original = plan_text(plan_at(13_000)).encode()
    values = [
        b"null",
        b"-1",
        b"1e400",
        b"NaN",
        b"[]",
        b"{}",
        b'""',
        b"true",
        b"1e18",
        b'"\\u0000"',
        b"0.5",
        b"-0",
        b'"rtn"',
    ]
    generator = random.Random(0)
    path, again, refused, read = tmp_path / "plan.json", tmp_path / "again.json", 0, 0
    for _ in range(1000):
        data = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(data))
            kind = generator.randrange(6)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                del data[at : at + generator.randint(1, 40)]
            elif kind == 2:
                data[at:at] = data[generator.randrange(len(data)) :][: generator.randint(1, 40)]
            elif kind == 3:
                digits = [i for i in range(len(data)) if 48 <= data[i] <= 57]
                data[generator.choice(digits)] = 48 + generator.randrange(10)
            elif kind == 4:
                colons = [i for i in range(len(data)) if data[i : i + 2] == b": "]
                start = generator.choice(colons) + 2
                stop = min(i for i in (data.find(b",", start), data.find(b"}", start), len(data)) if i > 0)
                data[start:stop] = generator.choice(values)
            elif at > len(data) // 2:
                del data[at:]
            if not data:
                data = bytearray(b" ")
        path.write_bytes(bytes(data))
        try:
            plan = read_plan(path)
        except InputError as error:
            assert str(error)
            refused += 1
            continue
        write_plan(again, plan)
        assert read_plan(again) == plan
        read += 1
    assert refused > 500
    assert read > 30


def test_difference() -> None:
    a, b = plan_at(12_000), plan_at(14_000)
    found = difference(a, b)
    assert found.same_network
    assert found.bytes == b.predicted.bytes - a.predicted.bytes == sum(row.bytes for row in found.sites)
    assert found.damage == pytest.approx(sum(row.damage for row in found.sites))
    assert found.damage < 0
    assert found.unchanged + len(found.sites) == len(a.sites)
    assert all(row.before == a.sites[row.site].recipe and row.after == b.sites[row.site].recipe for row in found.sites)
    same = difference(a, a)
    assert (same.sites, same.blocks, same.bytes, same.damage) == ((), (), 0, 0.0)


def test_difference_of_plans_with_other_sites_and_blocks() -> None:
    a = plan_at(12_000)
    sites = dict(a.sites)
    sites["table.2"] = sites.pop("table")
    b = PlanFile(PlanNetwork("tiny", "ffff", 40_000), a.budget, a.predicted, {"layer.1": "as is"}, sites)
    found = difference(a, b)
    assert not found.same_network
    assert {(row.site, row.before is None, row.after is None) for row in found.sites} == {
        ("table", False, True),
        ("table.2", True, False),
    }
    assert [(row.block, row.before, row.after) for row in found.blocks] == [("layer.1", "folded", "as is")]
