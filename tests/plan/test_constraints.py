"""``--keep`` and ``--fix``: what they leave in the tree, and the sentences for what cannot be."""

from __future__ import annotations

import pytest

from layerwise.errors import InputError
from layerwise.plan.constraints import constrain, is_dense
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Candidate, Choice, Leaf, Node, Sum, leaves


def linear(site: str) -> Leaf:
    candidates = [Candidate(f"rtn:bits={b},group=64", 1000 * b, 4.0**-b) for b in (2, 4, 8)]
    return Leaf(site, (*candidates, Candidate("dense", 16_000, 0.0)))


def tree() -> Node:
    folded = Leaf("layer.0.up", (Candidate("gptq:bits=2,group=64", 1900, 0.01),))
    block = Choice("layer.0", (("as is", linear("layer.0.up")), ("folded", folded)))
    return Sum("network", (linear("table"), block, linear("layer.1.up")))


def recipes(node: Node, site: str) -> list[list[str]]:
    return [[c.recipe for c in leaf.candidates] for leaf in leaves(node) if leaf.name == site]


def test_nothing_asked_nothing_changed() -> None:
    assert constrain(tree()) == tree()


def test_kept_sites_are_dense() -> None:
    kept = constrain(tree(), keep=[r"layer\.\d+\.up$"])
    assert recipes(kept, "layer.0.up") == [["dense"]]  # the folded alternative has no 16-bit candidate and is gone
    assert recipes(kept, "layer.1.up") == [["dense"]]
    assert recipes(kept, "table") == recipes(tree(), "table")
    assert Pareto().allocate(kept, 40_000).sites["layer.1.up"].recipe == "dense"


def test_fixed_sites_have_one_recipe() -> None:
    fixed = constrain(tree(), fix=["table= rtn:group=64,bits=8", "layer.0.up=gptq:bits=2,group=64"])
    assert recipes(fixed, "table") == [["rtn:bits=8,group=64"]]
    assert recipes(fixed, "layer.0.up") == [["gptq:bits=2,group=64"]]
    assert Pareto().allocate(fixed, 12_000).choices == {"layer.0": "folded"}


@pytest.mark.parametrize(
    ("keep", "fix", "says"),
    [
        (["("], [], "not a regular expression"),
        (["lyer.1.upp"], [], "matches no site; did you mean layer.1.up"),
        ([], ["tabel=rtn:bits=8"], "no site 'tabel'; did you mean table"),
        ([], ["table=rtn:bits=3"], "no candidate 'rtn:bits=3,group=64'; it offers rtn:bits=2,group=64, "),
        ([], ["table=rtm:bits=3"], "no technique named 'rtm'"),
        ([], ["table"], "must be SITE=RECIPE"),
        ([], ["table="], "must be SITE=RECIPE"),
        ([], ["table=rtn:bits=2", "table=rtn:bits=4"], "fixed twice"),
        (["table"], ["table=rtn:bits=2"], "both fixed"),
    ],
)
def test_refused(keep: list[str], fix: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        constrain(tree(), keep, fix)


def test_a_site_without_a_dense_candidate_cannot_be_kept() -> None:
    only = Sum("network", (Leaf("norm", (Candidate("rtn:bits=8,group=64", 10, 0.0),)),))
    with pytest.raises(InputError, match="'norm' cannot be kept at 16 bits"):
        constrain(only, keep=["norm"])


def test_which_recipes_are_dense() -> None:
    assert is_dense("dense")
    assert is_dense("dense:dtype=bfloat16")
    assert is_dense("awq+dense")
    assert not is_dense("rtn:bits=4,group=64")
