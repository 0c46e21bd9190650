"""What the kind of a network rules out, found before long work: nothing works on blocks that it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.acts.wanted import wanted_by
from layerwise.errors import InputError
from layerwise.plan.menu import Menu
from layerwise.recipe import parse_recipe

if TYPE_CHECKING:
    from layerwise.acts.prepare import Options


def refuse_block_by_block(options: Options, menu: Menu) -> None:
    """A network that was opened as a module runs whole: what works on blocks has nothing to work on."""
    asked = {"--sequential": options.sequential, "--tune": options.tune, "--rewrite": options.rewrite}
    named = [option for option, value in asked.items() if value] + list(menu.surgeons)
    if named:
        raise InputError(
            f"{named[0]} goes block by block, and a network that was opened as a module has none; leave it out"
        )


def refuse_of_arranged(options: Options, menu: Menu, only: Mapping[str, str]) -> None:
    """Blocks that run side by side or several times have no inputs, and no place, of their own."""
    asked = {"--sequential": options.sequential, "--tune": options.tune, "--rewrite": options.rewrite}
    named = [option for option, value in asked.items() if value] + list(menu.surgeons)
    recipes = (*menu.linear, *menu.table, *only.values())
    named += [recipe for recipe in recipes if parse_recipe(recipe).rewrites]
    if named:
        raise InputError(
            f"{named[0]} works on blocks that run once, one after the other, and this network arranges its blocks; "
            f"leave it out, or do it to the network that was arranged"
        )
    read = [recipe for recipe in recipes if wanted_by([recipe]).attention or wanted_by([recipe]).importance]
    if read:
        raise InputError(
            f"{read[0]} reads the attention of one block at a time, and this network arranges its blocks; "
            f"choose another technique"
        )
    if menu.target is not None:
        raise InputError(f"{menu.target.name} knows no arrangement of blocks; leave out --target")
