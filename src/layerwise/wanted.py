"""What the techniques of a run ask to have measured beyond what every run measures."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from layerwise.calibrate.statistics import Wanted
from layerwise.recipe import parse_recipe
from layerwise.technique import ATTENTION_CURVATURE, LARGEST_INPUT, TOKEN_IMPORTANCE, WEIGHT_GRADIENT


def wanted_by(recipes: Iterable[str]) -> Wanted:
    """The optional measurements that some recipe needs."""
    return wanted_of(frozenset().union(*(parse_recipe(recipe).needs for recipe in recipes)))


def wanted_of(needs: Collection[str]) -> Wanted:
    """The optional measurements among a technique's ``needs``."""
    return Wanted(
        importance=TOKEN_IMPORTANCE in needs,
        gradient=WEIGHT_GRADIENT in needs,
        largest=LARGEST_INPUT in needs,
        attention=ATTENTION_CURVATURE in needs,
    )
