"""Which recipes are tried at which site.

The default menu is what a byte is best spent on: trellises of 1 to 5 bits, even grids above them, and a few forms below
two bits. For an engine, and for a tuner, which take even grids alone, it is even grids of every width from 2 to 8 bits,
with groups that grow as the width does, since a finer grid needs fewer scales. A scale is stored in 8 bits beside one
float16 factor a row: half the bytes of a float16 scale for an error that does not show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from layerwise.errors import InputError
from layerwise.plan.targets import Matrix, Target, described, spec_of
from layerwise.recipe import Recipe, canonical, parse_recipe, parse_technique, surgery
from layerwise.roles import Encoder, Rewrite
from layerwise.technique import find

# (bits, group) of a linear, and of a table, which is larger and slower to encode
LINEAR_GRIDS = ((2, 128), (2, 32), (3, 128), (3, 32), (4, 128), (4, 32), (5, 64), (6, 128), (8, 128))
TABLE_GRIDS = ((2, 128), (2, 32), (3, 128), (3, 32), (4, 128), (4, 32), (5, 128), (6, 128), (8, 128))
EVEN_GRIDS = ("two_sided",)
DEFAULT_TECHNIQUES = ("trellis", *EVEN_GRIDS)
BEYOND_TRELLIS = ((6, 128), (8, 128))  # what the default menu takes of even grids
# Below three bits a weight even grids run out, and at two a trellis is not always best: these join the menu, for
# linears only. They are in it whatever the budget, so that a work folder serves every budget. As drafts they add a
# twelfth to the time of a whole compression of examples/docs-lm; more tokens make the share smaller.
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
KEPT = "kept"
WIDE = 8  # bits at which a step for few columns buys nothing
UNREACHED = "rtn:bits=8,group=0"  # a site the loss does not reach: small and safe, never searched


@dataclasses.dataclass(frozen=True)
class Menu:
    """Recipe texts, canonical, per kind of site; with a target only those that its engine loads."""

    linear: tuple[str, ...]
    table: tuple[str, ...]
    surgeons: tuple[str, ...] = ()  # that may take whole blocks out
    target: Target | None = None
    plain: str = "dense"  # what keeps a site at 16 bits
    keeps: bool = False  # whether a site may keep the encoding that it came in

    def of(self, kind: str, columns: int) -> tuple[str, ...]:
        """The recipes for a site of this kind and width, without those that are the same grid at this width."""
        recipes = self.table if kind in ("table", "head") else self.linear
        return _distinct([fitted(recipe, columns) for recipe in recipes])

    def offered(self, site: Matrix) -> tuple[str, ...]:
        """The recipes for a site: those of its kind and width that the target loads, 16 bits where it loads none."""
        recipes = self.of(site.kind, site.columns)
        if self.target is None:
            return recipes
        return tuple(r for r in recipes if self.target.refusal(spec_of(r), site) is None) or (self.plain,)

    def kept(self, site: Matrix, spec: Mapping[str, Any] | None) -> tuple[str, ...]:
        """The recipe that stores again what a site came in, of the form ``spec``; none for a form that is no grid."""
        if not self.keeps or spec is None or spec["form"] != "integer" or spec["float_zero"] or spec["scale_bits"] == 8:
            return ()
        if self.target is not None and self.target.refusal(spec, site) is not None:
            return ()
        symmetric = ",symmetric=true" if spec["symmetric"] else ""
        return (str(parse_recipe(f"{KEPT}:bits={spec['bits']},group={spec['group']}{symmetric}")),)

    def unreached(self, site: Matrix) -> tuple[str, ...]:
        """The recipes for a site that the loss does not reach: one, unless its neighbours in the engine decide."""
        if self.target is None:
            return (UNREACHED,)
        if any(site.name.rpartition(".")[2] in names for names in self.target.fused):
            return self.offered(site)
        widest = [
            f"rtn:bits={max(g.bits)},group={group},symmetric={str(g.symmetric).lower()}"
            for g in self.target.grids(site)
            for group in sorted(g.groups, key=lambda group: -(group or site.columns))
        ]
        fits = [str(parse_recipe(r)) for r in widest if self.target.refusal(spec_of(r), site) is None]
        return (fits[0] if fits else self.plain,)


def make_menu(techniques: Sequence[str], dtype: str, target: Target | None = None, *, even: bool = False) -> Menu:
    """The menu of some techniques: ``["gptq", "awq+rtn", "hqq:bits=3,group=64"]``.

    A technique without options stands for its whole range of widths and groups; one with options for itself alone. A
    surgeon adds the removal of blocks to whatever else is asked for.
    The 16-bit candidate is always there. With a target, ranges are those that its engine loads; raises ``InputError``
    for a technique that makes nothing of the kind. ``even``: where no technique is named, even grids alone.
    """
    linear: list[str] = []
    table: list[str] = []
    surgeons = tuple(text for text in techniques if surgery(text))
    others = [text for text in techniques if text not in surgeons]
    for text in others:
        chain, encoder = _parts(text)
        if ":" in text:
            recipe = str(parse_recipe(text))
            if target is not None:
                check_held(recipe, target)
            linear.append(recipe)
            table.append(str(parse_recipe(recipe).encoder))
            continue
        prefix = "+".join([*chain, ""])
        linear += [str(parse_recipe(prefix + setting)) for setting in _settings(encoder, LINEAR_GRIDS, target)]
        if find(encoder).family == LINEARS_ONLY:
            table += _for_tables(_default(TABLE_GRIDS, target, even))
        else:
            table += _for_tables(_settings(encoder, TABLE_GRIDS, target))
    if not others:
        linear += _default(LINEAR_GRIDS, target, even)
        table += _for_tables(_default(TABLE_GRIDS, target, even))
        small = BELOW_TWO_BITS if target is None else [f"ternary:group={g},feedback=true" for g in target.ternary]
        linear += [str(parse_recipe(recipe)) for recipe in small]
    plain = f"dense:dtype={dtype}" if dtype != "float16" else "dense"
    plain = str(parse_recipe(plain))
    gone = _distinct([canonical(text) for text in surgeons])
    return Menu(_distinct([*linear, plain]), _distinct([*table, plain]), gone, target, plain, True)


def check_held(recipe: str, target: Target) -> None:
    """``InputError`` for a recipe whose form the target's engine loads at no linear."""
    if not target.holds(spec_of(recipe)):
        raise InputError(
            f"{recipe} stores {described(spec_of(recipe))}, which {target.name} does not load; it takes "
            f"{' or '.join(str(g) for g in target.linear)}"
        )


def target_settings(name: str, target: Target) -> list[str]:
    """An encoder's settings among what a target's engine loads; of the widest grids only those with few steps."""
    encoder = find(name)
    fields = {f.name for f in dataclasses.fields(encoder)}  # type: ignore[arg-type]
    if {"bits", "group", "symmetric"} <= fields and not encoder.menu:
        made = [
            f"{name}:bits={bits},group={group}" + (",symmetric=true" if grids.symmetric else "")
            for grids in target.planned or target.linear
            for bits in grids.bits
            for group in (grids.groups if bits < WIDE else sorted(grids.groups, key=lambda g: g or 1 << 30)[-2:])
        ]
    else:
        made = [f"{name}:{options}" for options in encoder.menu] or [name]
    held = [setting for setting in made if target.holds(spec_of(setting))]
    if not held:
        raise InputError(
            f"{name} makes nothing that {target.name} loads: it takes {' or '.join(str(g) for g in target.linear)}"
        )
    return held


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


def _settings(name: str, grids: Sequence[tuple[int, int]], target: Target | None = None) -> list[str]:
    """What a target's engine loads of an encoder, or its own menu, or the shared range of grids."""
    if target is not None:
        return target_settings(name, target)
    if menu := find(name).menu:
        return [f"{name}:{options}" for options in menu]
    return [_on_grid(name, bits, group) for bits, group in grids]


def _default(grids: Sequence[tuple[int, int]], target: Target | None, even: bool) -> list[str]:
    """What stands for no technique at all."""
    if even or target is not None:
        made = [setting for name in EVEN_GRIDS for setting in _settings(name, grids, target)]
    else:
        made = [s for name in DEFAULT_TECHNIQUES for s in _settings(name, BEYOND_TRELLIS)]
    return [str(parse_recipe(setting)) for setting in made]


def _for_tables(settings: Sequence[str]) -> list[str]:
    return [str(_for_table(parse_recipe(setting))) for setting in settings]


def _for_table(recipe: Recipe) -> Recipe:
    """A table's recipe: its many rows stand alone, so that fitting their steps again takes long for little.

    What they have in common is taken out first where an encoder can.
    """
    fields = {f.name for f in dataclasses.fields(recipe.encoder)}  # type: ignore[arg-type]
    changes = {name: value for name, value in (("refits", 0), ("centred", True)) if name in fields}
    return Recipe(recipe.rewrites, dataclasses.replace(recipe.encoder, **changes))  # type: ignore[type-var, arg-type]


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
