"""What the techniques of a run ask to have measured beyond what every run measures."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from layerwise.calibrate.statistics import Wanted
from layerwise.recipe import parse_recipe
from layerwise.technique import (
    ATTENTION_CURVATURE,
    LARGEST_INPUT,
    OF_THE_REVERSE_PASS,
    TOKEN_IMPORTANCE,
    WEIGHT_GRADIENT,
)

if TYPE_CHECKING:
    from layerwise.acts.prepare import Prepared


def wanted_by(recipes: Iterable[str]) -> Wanted:
    """The optional measurements that some recipe needs."""
    return wanted_of(frozenset().union(*(parse_recipe(recipe).needs for recipe in recipes)))


def need_gradients(recipes: Iterable[str]) -> bool:
    """Whether some recipe needs what only the reverse pass measures."""
    return any(OF_THE_REVERSE_PASS & parse_recipe(recipe).needs for recipe in recipes)


def predicts(prepared: Prepared) -> bool:
    """Whether damages are predicted: a uniform setting is encoded without gradients where its recipes need none."""
    recipes = (*prepared.menu.linear, *prepared.menu.table, *prepared.only.values())
    return not prepared.options.uniform or need_gradients(recipes)


def wanted_of(needs: Collection[str]) -> Wanted:
    """The optional measurements among a technique's ``needs``."""
    return Wanted(
        importance=TOKEN_IMPORTANCE in needs,
        gradient=WEIGHT_GRADIENT in needs,
        largest=LARGEST_INPUT in needs,
        attention=ATTENTION_CURVATURE in needs,
    )
