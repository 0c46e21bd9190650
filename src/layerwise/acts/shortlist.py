"""Which candidates of one search belong to one technique, so that several can be planned for apart from each other.

All techniques share the passes over the network; afterwards each is given only what a search with it alone would have
found: its own recipes, 16 bits, and what sites get that are not searched.
"""

from __future__ import annotations

from dataclasses import replace

from layerwise.acts.kept import Candidates, SiteCandidates
from layerwise.acts.rewriting import AS_IS, chain_of, chains, encoder_of
from layerwise.plan.constraints import is_dense
from layerwise.plan.menu import Menu


def shortlist(found: Candidates, menu: Menu) -> Candidates:
    """The candidates that ``menu`` alone would have offered."""
    sites = {name: _at_site(found, site, menu) for name, site in found.sites.items()}
    return replace(found, sites=sites, removals=None)


def _at_site(found: Candidates, site: SiteCandidates, menu: Menu) -> SiteCandidates:
    mine = chains(menu.linear)
    places = [i for i, c in enumerate(site.candidates) if _belongs(found, site, c.recipe, menu, mine)]
    return replace(
        site,
        candidates=tuple(site.candidates[i] for i in places),
        stored=tuple(site.stored[i] for i in places),
    )


def _belongs(found: Candidates, site: SiteCandidates, recipe: str, menu: Menu, mine: tuple[str, ...]) -> bool:
    chain = chain_of(recipe)
    if chain not in (AS_IS, *mine):
        return False
    if not site.reached:
        return True
    offered = menu.offered(site.site)
    if recipe in offered or (is_dense(recipe) and encoder_of(recipe) in offered):
        return True
    refused = found.refused.get(site.site.block or "", {})
    # Outside the blocks, and in a block that refuses the rewrites, a recipe is tried without them.
    bare = site.site.block is None or (bool(mine) and all(label in refused for label in mine))
    return chain == AS_IS and bare and recipe in map(encoder_of, offered)
