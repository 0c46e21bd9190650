"""Alternatives of a block: the same function written with other weights, before anything is encoded.

A recipe such as ``awq+gptq:bits=3`` asks for a rewrite. A rewrite changes several matrices of a block together (and a
norm), so it is carried out once per block and chain of rewrites, and the planner picks one alternative for the whole
block: "as is", or one of the chains. What a chain made of a block is kept in the work folder for later acts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwise.calibrate.forward import learn_output_shape
from layerwise.calibrate.passes import Calibration, Fitted, Part
from layerwise.errors import InputError
from layerwise.network.folds import TOLERANCE, BlockScope, Fold, find_folds
from layerwise.network.rotary_pairs import RotaryPairs, find_rotary_pairs
from layerwise.network.streaming import Streamer
from layerwise.recipe import parse_recipe, surgery
from layerwise.roles import Rewrite

AS_IS = "as is"
PROBED_SEQUENCES = 2  # that folds are tried on


@dataclass(frozen=True)
class Alternative:
    """One way to write a block. ``sites`` and ``weights`` are by site name, ``plain`` by parameter name."""

    label: str
    sites: dict[str, Fitted]
    weights: dict[str, Tensor]
    plain: dict[str, Tensor]


@cache
def chain_of(recipe: str) -> str:
    """The alternative that a recipe belongs to: its rewrites as text, ``awq``; a surgeon; ``as is`` without any."""
    if gone := surgery(recipe):
        return str(gone)
    return "+".join(str(r) for r in parse_recipe(recipe).rewrites) or AS_IS


@cache
def encoder_of(recipe: str) -> str:
    """The recipe without its rewrites."""
    return str(parse_recipe(recipe).encoder)


def chained(label: str, encoder: str) -> str:
    """The recipe of ``encoder`` after the rewrites of an alternative."""
    return encoder if label == AS_IS else str(parse_recipe(f"{label}+{encoder}"))


def chains(recipes: Iterable[str]) -> tuple[str, ...]:
    """The distinct chains of rewrites that some recipes ask for, ``as is`` left out."""
    return tuple(dict.fromkeys(label for label in map(chain_of, recipes) if label != AS_IS))


class Rewriter:
    """Carries out rewrites on the blocks of one network, with a streamer of its own to probe them."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration, self.network = calibration, calibration.network

    @cached_property
    def streamer(self) -> Streamer:
        return Streamer(self.network, device=self.calibration.device)

    def refuse_impossible(self, labels: Iterable[str]) -> None:
        """Raise a rewrite's own refusal when no block of the network has a place for it; looks at weights only."""
        blocks = self.network.tree.blocks
        if not blocks:
            raise InputError(f"{next(iter(labels))} rewrites blocks, and this network has none; leave it out")
        if any(self.folds(block) for block in blocks):
            return
        for label in labels:
            rewritten(self.scope(blocks[0], {}), label)

    def alternative(self, part: Part, label: str) -> Alternative:
        """The block of a unit under a chain of rewrites; ``InputError`` if one of them refuses it."""
        scope = rewritten(self.scope(part.unit, part.sites), label)
        sites = self.network.tree.of_block(part.unit)
        paths = {s.name: s.name.removeprefix(f"{part.unit}.") for s in sites}
        covered = {s.parameter for s in sites}
        parameters = {f"{part.unit}.{name}": value for name, value in scope.parameters.items()}
        return Alternative(
            label,
            {name: Fitted(scope.fit[path], scope.judge[path]) for name, path in paths.items() if name in part.sites},
            {name: scope.weight(path).contiguous() for name, path in paths.items()},
            {name: value.contiguous() for name, value in parameters.items() if name not in covered},
        )

    def scope(self, block: str, sites: Mapping[str, Fitted]) -> BlockScope:
        """A block as values, with its exact folds found by trying them."""
        tree = self.network.tree
        path = {s.name: s.name.removeprefix(f"{block}.") for s in tree.of_block(block)}
        return BlockScope(
            block,
            self.network.read_part(block),
            frozenset(path[s.name] for s in tree.of_block(block) if s.transposed),
            {path[name]: fitted.fit for name, fitted in sites.items()},
            {path[name]: fitted.judge for name, fitted in sites.items()},
            self.folds(block),
            self.rotary(block),
        )

    def folds(self, block: str) -> tuple[Fold, ...]:
        """A block's exact folds."""
        with self.probed(block) as (member, run, hidden):
            return find_folds(member, run, hidden, self.calibration.seed)

    def rotary(self, block: str) -> tuple[RotaryPairs, ...]:
        """A block's queries and keys that are rotated in pairs."""
        with self.probed(block) as (member, run, hidden):
            return find_rotary_pairs(member, run, hidden, self.calibration.seed, TOLERANCE)

    @contextmanager
    def probed(self, block: str) -> Iterator[tuple[nn.Module, Callable[[nn.Module], Tensor], Tensor]]:
        """(the block with its weights, what runs it, the hidden state that it is run on)."""
        calibration, streamer, index = self.calibration, self.streamer, self.network.tree.blocks.index(block)
        inputs, batch = calibration.inputs(), calibration.splits.all[0].rows(0, PROBED_SEQUENCES)
        learn_output_shape(streamer, batch, inputs[index])
        with torch.inference_mode():
            with streamer.head_of_network() as enter:
                call = enter(batch, index)[1]
            hidden = inputs[index].read(0)[:PROBED_SEQUENCES].to(streamer.device)
            with streamer.block(index) as member:
                yield member, lambda m: streamer.run_block(m, hidden, call), hidden


def rewritten(scope: BlockScope, label: str) -> BlockScope:
    """The scope after every rewrite of a chain."""
    for text in label.split("+"):
        technique = parse_recipe(f"{text}+dense").rewrites[0]
        assert isinstance(technique, Rewrite)
        scope = technique.rewrite(scope)
        check_finite(scope, text)
    return scope


def check_finite(scope: BlockScope, label: str) -> None:
    lost = next((n for n, v in scope.parameters.items() if not bool(torch.isfinite(v).all())), None)
    if lost is not None:
        raise InputError(f"{label} makes values of {scope.path}.{lost} that are not finite; leave it out here")


# ---------------------------------------------------------------- what is kept


def suffix_of(label: str) -> str:
    """What an alternative adds to the names of its files."""
    return "" if label == AS_IS else "." + re.sub(r"[^A-Za-z0-9_=-]+", "-", label)


def file_of(folder: Path, unit: str, label: str) -> Path:
    """Where a stage keeps what a chain made of a block."""
    return folder / f"{unit}{suffix_of(label)}.rewritten"


def keep_alternative(folder: Path, unit: str, alternative: Alternative, with_weights: bool) -> None:
    """Write what the rewrite changed outside the sites, and the sites' rewritten matrices if they are wanted."""
    values = {f"plain/{name}": value for name, value in alternative.plain.items()}
    if with_weights:
        values |= {f"weight/{name}": value for name, value in alternative.weights.items()}
    file = file_of(folder, unit, alternative.label)
    save_file(values, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def kept_values(folder: Path, unit: str, label: str, kind: str) -> dict[str, Tensor]:
    """The kept ``plain`` parameters or the rewritten ``weight`` matrices of an alternative."""
    found = load_file(file_of(folder, unit, label))
    return {name.removeprefix(f"{kind}/"): v for name, v in found.items() if name.startswith(f"{kind}/")}
