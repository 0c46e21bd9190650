"""Which recipes are tried at which site.

The default menu is what a byte is best spent on among the techniques asked for: every width from 2 to 8 bits, with
groups that grow as the width does, since a finer grid needs fewer scales. A scale is stored in 8 bits beside one
float16 factor a row: half the bytes of a float16 scale for an error that does not show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

from layerwise.errors import InputError
from layerwise.recipe import Recipe, canonical, parse_recipe, parse_technique, surgery
from layerwise.roles import Encoder, Rewrite
from layerwise.technique import find

# (bits, group) of a linear, and of a table, which is larger and slower to encode
LINEAR_GRIDS = ((2, 128), (2, 32), (3, 128), (3, 32), (4, 128), (4, 32), (5, 64), (6, 128), (8, 128))
TABLE_GRIDS = ((2, 128), (2, 32), (3, 128), (3, 32), (4, 128), (4, 32), (5, 128), (6, 128), (8, 128))
DEFAULT_TECHNIQUES = ("two_sided",)
# Below three bits a weight even grids run out: these join the default menu, for linears only. They are in it whatever
# the budget, so that a work folder serves every budget. As drafts they add a twelfth to the time of a whole compression
# of examples/docs-lm; more tokens make the share smaller.
BELOW_TWO_BITS = (
    "ternary:group=0,feedback=true",
    "ternary:group=32,scale_bits=8,feedback=true",
    "bivit:group=0,feedback=true",
)
# Factors of a table are fitted to the entries that calibration met, and give up the others: measured on text of another
# kind that is many times worse than predicted. Tables of a plan with such factors are rounded.
LINEARS_ONLY = "factorize"
ELSEWHERE = {
    "tuner": "improve a finished plan with --tune {name}",
    "network rewrite": "rewrite the whole network first with --rewrite {name}",
    "probe": "look at the network with layerwise probe MODEL {name}",
    "surgeon": "name it apart from the others, as in two_sided,{name}",
    "activation quantizer": "quantize what goes into the linears with --activations {name}",
    "blueprint": "train a network of it with layerwise train {name}",
    "allocator": "it solves for the plan and encodes nothing; write --allocator {name}",
    "scorer": "it orders changes and encodes nothing; leave it out",
}  # role -> how a technique that encodes nothing is used
UNREACHED = "rtn:bits=8,group=0"  # a site the loss does not reach: small and safe, never searched


@dataclasses.dataclass(frozen=True)
class Menu:
    """Recipe texts, canonical, per kind of site."""

    linear: tuple[str, ...]
    table: tuple[str, ...]
    surgeons: tuple[str, ...] = ()  # that may take whole blocks out

    def of(self, kind: str, columns: int) -> tuple[str, ...]:
        """The recipes for a site of this kind and width, without those that are the same grid at this width."""
        recipes = self.table if kind in ("table", "head") else self.linear
        return _distinct([fitted(recipe, columns) for recipe in recipes])


def make_menu(techniques: Sequence[str], dtype: str) -> Menu:
    """The menu of some techniques: ``["gptq", "awq+rtn", "hqq:bits=3,group=64"]``.

    A technique without options stands for its whole range of widths and groups; one with options for itself alone. A
    surgeon adds the removal of blocks to whatever else is asked for.
    The 16-bit candidate is always there.
    """
    linear: list[str] = []
    table: list[str] = []
    surgeons = tuple(text for text in techniques if surgery(text))
    others = [text for text in techniques if text not in surgeons]
    for text in others or DEFAULT_TECHNIQUES:
        chain, encoder = _parts(text)
        if ":" in text:
            recipe = str(parse_recipe(text))
            linear.append(recipe)
            table.append(str(parse_recipe(recipe).encoder))
            continue
        for grids, out in ((LINEAR_GRIDS, linear), (TABLE_GRIDS, table)):
            prefix = "+".join(chain) + "+" if chain and out is linear else ""
            named = DEFAULT_TECHNIQUES[0] if out is table and find(encoder).family == LINEARS_ONLY else encoder
            made = [parse_recipe(prefix + setting) for setting in _settings(named, grids)]
            out += [str(_quick(recipe) if out is table else recipe) for recipe in made]
    if not others:
        linear += [str(parse_recipe(recipe)) for recipe in BELOW_TWO_BITS]
    plain = f"dense:dtype={dtype}" if dtype != "float16" else "dense"
    return Menu(
        _distinct([*linear, plain]), _distinct([*table, plain]), _distinct([canonical(text) for text in surgeons])
    )


def uniform_recipes(recipe: Recipe, embeddings: str) -> tuple[str, str]:
    """(linear recipe, table recipe) of a uniform baseline; tables on the same grid by rounding, or int8 rows."""
    if embeddings == "int8":
        return str(recipe), "rtn:bits=8,group=0"
    if embeddings != "same":
        raise InputError(f"--embeddings must be same or int8, not {embeddings!r}")
    fields = {f.name for f in dataclasses.fields(find("rtn"))}  # type: ignore[arg-type]
    shared = {
        f.name: getattr(recipe.encoder, f.name)
        for f in dataclasses.fields(recipe.encoder)  # type: ignore[arg-type]
        if f.name in fields and f.name in ("bits", "group", "symmetric", "scale_bits")
    }
    if not shared:
        return str(recipe), str(recipe.encoder)
    if "bits" in shared:  # kept values of a sparse form may have one bit or sixteen, which are no grid of rounding
        shared["bits"] = min(max(shared["bits"], 2), 8)
    return str(recipe), "rtn:" + ",".join(f"{k}={str(v).lower()}" for k, v in shared.items())


@cache
def fitted(recipe: str, columns: int) -> str:
    """The recipe as it is best written for rows of this width.

    Eight-bit scales need a factor a row and pay from three groups a row on; below that a float16 scale is smaller
    and better. A group wider than the row is the row.
    """
    parsed = parse_recipe(recipe)
    encoder = parsed.encoder
    fields = {f.name for f in dataclasses.fields(encoder)}  # type: ignore[arg-type]
    changes: dict[str, int] = {}
    if "group" in fields and encoder.group > columns:  # type: ignore[attr-defined]
        changes["group"] = 0
    groups = -(-columns // (changes.get("group", getattr(encoder, "group", 0)) or columns))
    if "scale_bits" in fields and encoder.scale_bits == 8 and groups < 3:  # type: ignore[attr-defined]
        changes["scale_bits"] = 16
    if not changes:
        return recipe
    return str(Recipe(parsed.rewrites, dataclasses.replace(encoder, **changes)))  # type: ignore[type-var]


def _parts(text: str) -> tuple[list[str], str]:
    names = [part.strip() for part in text.split("+") if part.strip()]
    if not names:
        raise InputError("a technique name is empty; write --techniques rtn,gptq")
    for name in names[:-1]:
        if not isinstance(parse_technique(name), Rewrite):
            raise InputError(f"{name!r} in {text!r} is not a rewrite; a recipe is rewrites and then one encoder")
    last = find(names[-1].partition(":")[0])
    if not issubclass(last, Encoder):
        where = ELSEWHERE.get(last.role, f"write {text}+rtn or {text}+gptq").format(name=last.name)
        raise InputError(f"{text!r} ends in {last.name!r}, whose role is {last.role} and not encoder; {where}")
    return names[:-1], names[-1]


def _settings(name: str, grids: Sequence[tuple[int, int]]) -> list[str]:
    """An encoder's own menu, or the shared range of grids."""
    if menu := find(name).menu:
        return [f"{name}:{options}" for options in menu]
    return [_on_grid(name, bits, group) for bits, group in grids]


def _quick(recipe: Recipe) -> Recipe:
    """A table's recipe: it has many rows, each on its own, and fitting their steps again takes long for little."""
    if not any(f.name == "refits" for f in dataclasses.fields(recipe.encoder)):  # type: ignore[arg-type]
        return recipe
    return Recipe(recipe.rewrites, dataclasses.replace(recipe.encoder, refits=0))  # type: ignore[type-var]


def _on_grid(name: str, bits: int, group: int) -> str:
    fields = {f.name for f in dataclasses.fields(find(name))}  # type: ignore[arg-type]
    if "bits" not in fields:
        return name
    options = [f"bits={bits}"]
    if "group" in fields:
        options.append(f"group={group}")
    if "scale_bits" in fields:
        options.append("scale_bits=8")
    return f"{name}:" + ",".join(options)


def _distinct(items: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
