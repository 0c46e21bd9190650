"""Which recipes a run may choose among: techniques, ``--uniform``, ``--fix``, ``--redo`` and the target's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.acts.candidates import plain_recipe
from layerwise.errors import InputError, nearest
from layerwise.network.network import Network
from layerwise.plan.constraints import matching
from layerwise.plan.file import read_plan
from layerwise.plan.menu import Menu, check_held, make_menu, uniform_recipes
from layerwise.plan.targets import Target, described, find_target, spec_of
from layerwise.plan.tree import Leaf, Sum
from layerwise.recipe import parse_recipe

if TYPE_CHECKING:
    from layerwise.acts.prepare import Options


def menu_of(options: Options, network: Network) -> tuple[Menu, dict[str, str]]:
    """The recipes to try, and the sites where only one is."""
    target = target_of(options)
    if target is not None and target.architectures and network.architecture not in target.architectures:
        raise InputError(
            f"{network.name} is a {network.architecture}; for {target.name} layerwise writes "
            f"{', '.join(target.architectures)}"
        )
    only = dict(site_and_recipe(entry, network, "--redo", target) for entry in options.redo)
    if options.uniform is not None:
        linear, table = uniform_recipes(parse_recipe(options.uniform), options.embeddings)
        if target is not None:
            check_held(linear, target)
        return Menu((linear,), (str(parse_recipe(table)),), target=target, plain=plain_recipe(network)), only
    dtype = str(network.plain_dtype).removeprefix("torch.")
    menu = make_menu(options.techniques, dtype, target, even=options.tune is not None)
    for entry in options.fix:
        site, recipe = site_and_recipe(entry, network, "--fix", target)
        only.setdefault(site, recipe)
    names = Sum("network", tuple(Leaf(s.name, ()) for s in network.tree.sites))
    for pattern in options.keep:
        matching(names, pattern)
    return menu, only


def target_of(options: Options) -> Target | None:
    """The engine that the run is for, as asked for or as the plan to apply says."""
    asked = find_target(options.target)
    if options.plan is None:
        found = asked
    else:
        planned = find_target(read_plan(options.plan).target)
        if options.target is not None and asked != planned:
            made = "layerwise" if planned is None else planned.name
            raise InputError(f"the plan was made for {made}; plan again with --target {options.target}")
        found = planned
    if found is not None and found.fused and options.allocators:
        raise InputError(
            f"{found.name} has sites that must share a format, which --allocator {options.allocators[0]} does not "
            f"know; leave it out"
        )
    return found


def site_and_recipe(entry: str, network: Network, option: str, target: Target | None = None) -> tuple[str, str]:
    site, equals, recipe = entry.partition("=")
    if not equals:
        raise InputError(f"{option} is written SITE=RECIPE, not {entry!r}")
    names = [s.name for s in network.tree.sites if s.searched]
    if site not in names:
        raise InputError(f"{option} names a site {site!r} that the network does not have{nearest(site, names)}")
    found = str(parse_recipe(recipe))
    reason = None if target is None else target.refusal(spec_of(found), network.tree.find(site))
    if reason is not None:
        raise InputError(f"{option} gives {site} {described(spec_of(found))}; {reason}")
    return site, found
