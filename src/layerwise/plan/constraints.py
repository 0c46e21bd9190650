"""What the user decides about sites beforehand: ``--keep REGEX`` and ``--fix SITE=RECIPE``, applied to the tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from layerwise.errors import InputError, nearest
from layerwise.plan.tree import Candidate, Choice, Leaf, Node, Sum, leaves
from layerwise.recipe import parse_recipe


def constrain(tree: Node, keep: Iterable[str] = (), fix: Iterable[str] = ()) -> Node:
    """The tree with kept sites at 16 bits and fixed sites at their recipe; both as the command line gives them."""
    fixed = read_fixes(fix)
    for pattern in keep:
        for name in matching(tree, pattern):
            if name in fixed:
                raise InputError(f"site {name!r} is both fixed to {fixed[name]!r} and kept by {pattern!r}; choose one")
        tree = keep_dense(tree, pattern)
    return fix_recipes(tree, fixed)


def read_fixes(texts: Iterable[str]) -> dict[str, str]:
    """``["SITE=RECIPE", …]`` -> site -> canonical recipe."""
    fixed: dict[str, str] = {}
    for text in texts:
        site, equals, recipe = (part.strip() for part in text.partition("="))
        if not (site and equals and recipe):
            raise InputError(f"{text!r} must be SITE=RECIPE, such as encoder.layer.0.output.dense=rtn:bits=8")
        canonical = str(parse_recipe(recipe))
        if fixed.setdefault(site, canonical) != canonical:
            raise InputError(f"site {site!r} is fixed twice, to {fixed[site]!r} and to {canonical!r}; choose one")
    return fixed


def is_dense(recipe: str) -> bool:
    """Whether a recipe leaves the weight at 16 bits."""
    return recipe.rpartition("+")[2].partition(":")[0].strip() == "dense"


def matching(tree: Node, pattern: str) -> list[str]:
    """Sites whose module path contains a match of the pattern; ``InputError`` when none does."""
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"--keep {pattern!r} is not a regular expression: {error}") from None
    names = list(dict.fromkeys(leaf.name for leaf in leaves(tree)))
    found = [name for name in names if regex.search(name)]
    if not found:
        raise InputError(f"--keep {pattern!r} matches no site{nearest(pattern, names)}")
    return found


def keep_dense(tree: Node, pattern: str) -> Node:
    """Sites that match stay at 16 bits."""
    return _restricted(tree, dict.fromkeys(matching(tree, pattern), is_dense), "kept at 16 bits")


def fix_recipes(tree: Node, fixed: Mapping[str, str]) -> Node:
    """Each named site keeps only its recipe."""
    known = list(dict.fromkeys(leaf.name for leaf in leaves(tree)))
    tests: dict[str, Callable[[str], bool]] = {}
    for site, recipe in fixed.items():
        if site not in known:
            raise InputError(f"there is no site {site!r}{nearest(site, known)}")
        wanted = str(parse_recipe(recipe))
        tests[site] = wanted.__eq__
        offered = list(dict.fromkeys(c.recipe for leaf in leaves(tree) if leaf.name == site for c in leaf.candidates))
        if wanted not in offered:
            raise InputError(f"site {site!r} has no candidate {wanted!r}; it offers {', '.join(offered)}")
    return _restricted(tree, tests, "fixed")


def _restricted(tree: Node, tests: Mapping[str, Callable[[str], bool]], what: str) -> Node:
    """The tree whose named sites keep only the recipes that pass; alternatives that have none left are dropped."""
    lost: list[str] = []
    result = _visit(tree, tests, lost)
    if result is None:
        offered = ", ".join(dict.fromkeys(c.recipe for x in leaves(tree) if x.name == lost[-1] for c in x.candidates))
        raise InputError(f"site {lost[-1]!r} cannot be {what}: no such candidate is left; it offers {offered}")
    return result


def _visit(node: Node, tests: Mapping[str, Callable[[str], bool]], lost: list[str]) -> Node | None:
    if isinstance(node, Leaf):
        test = tests.get(node.name)
        if test is None:
            return node
        left: tuple[Candidate, ...] = tuple(c for c in node.candidates if test(c.recipe))
        if not left:
            lost.append(node.name)
            return None
        return replace(node, candidates=left)
    if isinstance(node, Sum):
        children = [_visit(child, tests, lost) for child in node.children]
        return None if any(c is None for c in children) else Sum(node.name, tuple(c for c in children if c is not None))
    options = [(label, _visit(option, tests, lost)) for label, option in node.options]
    left_options = tuple((label, option) for label, option in options if option is not None)
    return Choice(node.name, left_options) if left_options else None
