"""Which recipes are tried where."""

from __future__ import annotations

import pytest

from layerwise.errors import InputError
from layerwise.plan.menu import make_menu, uniform_recipes
from layerwise.recipe import parse_recipe
from layerwise.technique import find, names


def encoders(recipes: tuple[str, ...]) -> set[str]:
    return {parse_recipe(recipe).encoder.name for recipe in recipes}


def test_a_technique_brings_its_own_menu() -> None:
    menu = make_menu(("sparsegpt",), "float16")
    assert {r.partition(":")[2] for r in menu.linear if r.startswith("sparsegpt")} == {
        str(parse_recipe(f"sparsegpt:{options}").encoder).partition(":")[2] for options in find("sparsegpt").menu
    }


def test_factors_are_not_offered_to_tables() -> None:
    """Their tables are rounded, as those of the default technique."""
    menu, usual = make_menu(("svd_llm",), "float16"), make_menu((), "float16")
    assert encoders(menu.linear) == {"svd_llm", "dense"} and menu.table == usual.table


def test_a_surgeon_adds_to_what_else_is_asked_for() -> None:
    menu = make_menu(("rtn", "drop_block:count=1"), "float16")
    assert menu.surgeons == ("drop_block:count=1",) and encoders(menu.linear) == {"rtn", "dense"}
    assert make_menu(("drop-block",), "float16").linear == make_menu((), "float16").linear


@pytest.mark.parametrize("name", sorted(set(names()) - set(names(find("rtn").__mro__[1]))))
def test_what_encodes_nothing_is_sent_where_it_belongs(name: str) -> None:
    if find(name).role == "surgeon":
        return
    with pytest.raises(InputError, match=f"whose role is {find(name).role} and not encoder"):
        make_menu((name,), "float16")


@pytest.mark.parametrize(("recipe", "table"), [("sparsegpt:bits=1,group=64", "rtn:bits=2"), ("wanda", "rtn:bits=8")])
def test_tables_of_a_uniform_setting_are_rounded_on_a_grid_there_is(recipe: str, table: str) -> None:
    assert uniform_recipes(parse_recipe(recipe), "same")[1].startswith(table)


def test_trellises_even_grids_above_them_and_few_values_are_the_default_menu() -> None:
    menu = make_menu((), "float16")
    assert encoders(menu.linear) == {"trellis", "two_sided", "ternary", "bivit", "dense"}
    assert encoders(menu.table) == {"trellis", "two_sided", "dense"}
    for recipes, centred in ((menu.linear, False), (menu.table, True)):
        assert all((",centred=true" in r) is centred for r in recipes if r.startswith("trellis"))
    wide = [parse_recipe(r).encoder for r in (*menu.linear, *menu.table) if r.startswith("two_sided")]
    assert {e.bits for e in wide} == {6, 8}  # type: ignore[attr-defined]


def test_a_tuner_is_offered_even_grids_of_every_width() -> None:
    menu, alone = make_menu((), "float16", even=True), make_menu(("two_sided",), "float16")
    assert encoders(menu.linear) == {"two_sided", "ternary", "bivit", "dense"}
    assert menu.table == alone.table and encoders(alone.linear) == {"two_sided", "dense"}


@pytest.mark.parametrize("recipe", [r for r in make_menu((), "float16").linear if "feedback" in r])
def test_a_candidate_of_the_default_menu_is_judged_by_less_work_in_the_same_layout(recipe: str) -> None:
    encoder = parse_recipe(recipe).encoder
    assert encoder.draft() != encoder and encoder.draft().layout(64, 256) == encoder.layout(64, 256)
