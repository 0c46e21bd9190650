"""An arrangement: in which order, how often and how many at a time a network's stored blocks run.

    "arrangement": {
      "steps": [0, 1, {"blocks": [2, 3], "combine": "sum"}, 1, {"blocks": [4, 5], "combine": "newton", "rounds": 2}],
      "extras": {"5": {"own": ["input_layernorm.weight"], "corrections": {"self_attn.q_proj": 4}}}
    }

A step is one stored block, or several that are given the same hidden state ``h``. With ``D_i(h) = block_i(h) - h``:

    sum      h + Σ D_i(h)
    mean     h + Σ D_i(h) / n
    newton   ``rounds`` times, all blocks at once: ĥ_l <- h + Σ_{i <= l} D_i(ĥ_{i-1}), from ĥ_l = h; the last ĥ_l.
             One round is ``sum``; as many rounds as blocks are the blocks one after the other.

A *use* is one run of one block; uses are counted in the order in which they happen, and each has its own slot of the
KV cache. ``extras`` gives a use what is its own: parameters in place of the stored block's, and low-rank corrections
``y + left (right x)`` of linears, by rank. A block that runs several times is stored, and counted, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from layerwise.errors import InputError

Combine = Literal["sum", "mean", "newton"]
MOST_USES = 1 << 14  # of all steps: a config cannot make us build more


@dataclass(frozen=True)
class Step:
    """Stored blocks that run on the same hidden state; one block alone is the ordinary case."""

    blocks: tuple[int, ...]
    combine: Combine = "sum"
    rounds: int = 1  # of newton

    @property
    def uses(self) -> int:
        return len(self.blocks) * self.rounds

    def written(self) -> Any:
        """As JSON."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        several: dict[str, Any] = {"blocks": list(self.blocks), "combine": self.combine}
        return several | ({"rounds": self.rounds} if self.combine == "newton" else {})


@dataclass(frozen=True)
class Extras:
    """What one use has of its own: parameter paths inside the block, and the rank of a linear's correction."""

    own: tuple[str, ...] = ()
    corrections: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrangement:
    """Steps in order over the stored blocks 0 … ``blocks - 1``, each of which is used at least once."""

    steps: tuple[Step, ...]
    extras: Mapping[int, Extras] = field(default_factory=dict)

    @property
    def uses(self) -> int:
        """How many runs of a block one forward pass makes, and how many slots its KV cache has."""
        return sum(step.uses for step in self.steps)

    @property
    def blocks(self) -> int:
        """How many blocks are stored."""
        return 1 + max(index for step in self.steps for index in step.blocks)

    @property
    def plain(self) -> bool:
        """Whether an ordinary network of as many blocks computes the same: nothing shared, parallel or of its own."""
        order = [index for step in self.steps for index in step.blocks]
        return all(len(step.blocks) == 1 for step in self.steps) and len(set(order)) == len(order) and not self.extras

    @property
    def serial(self) -> int:
        """Length of the chain of blocks that have to wait for one another."""
        return sum(step.rounds for step in self.steps)

    def parts(self) -> tuple[range, ...]:
        """Runs of steps, one behind the other, that share no block with another run: the shortest there are."""
        last = {index: place for place, step in enumerate(self.steps) for index in step.blocks}
        found: list[range] = []
        start = end = 0
        for place, step in enumerate(self.steps):
            end = max(end, *(last[index] for index in step.blocks))
            if place == end:
                found.append(range(start, place + 1))
                start = end = place + 1
        return tuple(found)

    def first_slots(self) -> tuple[int, ...]:
        """The first slot of each step."""
        found, slot = [], 0
        for step in self.steps:
            found.append(slot)
            slot += step.uses
        return tuple(found)

    def renumbered(self) -> tuple[Arrangement, tuple[int, ...]]:
        """The same with blocks numbered in the order of their first use, and which block each number was."""
        order = tuple(dict.fromkeys(index for step in self.steps for index in step.blocks))
        place = {index: i for i, index in enumerate(order)}
        steps = tuple(replace(step, blocks=tuple(place[i] for i in step.blocks)) for step in self.steps)
        return replace(self, steps=steps), order

    def written(self) -> dict[str, Any]:
        """As JSON."""
        value: dict[str, Any] = {"steps": [step.written() for step in self.steps]}
        if self.extras:
            value["extras"] = {
                str(slot): {"own": list(e.own), "corrections": dict(sorted(e.corrections.items()))}
                for slot, e in sorted(self.extras.items())
            }
        return value


def arrangement(steps: Sequence[int | Sequence[int] | Step], combine: Combine = "sum") -> Arrangement:
    """``arrangement([0, [1, 2], 3])``: block 0, then 1 and 2 side by side, then 3; blocks may repeat.

    Raises ``InputError`` for an empty one, or for an empty step.
    """
    found = []
    for step in steps:
        if isinstance(step, Step):
            found.append(step)
        else:
            found.append(Step((step,)) if isinstance(step, int) else Step(tuple(step), combine))
    return checked(Arrangement(tuple(found)))


def checked(found: Arrangement) -> Arrangement:
    """The arrangement with steps of one block written as such; ``InputError`` where it cannot run."""
    if not found.steps or any(not step.blocks for step in found.steps):
        raise InputError("an arrangement needs steps, and every step at least one block")
    steps = tuple(Step(step.blocks) if len(step.blocks) == 1 else step for step in found.steps)
    for step in steps:
        if any(type(index) is not int or not 0 <= index < MOST_USES for index in step.blocks):
            raise InputError(f"an arrangement's blocks are numbered from 0, not {list(step.blocks)}")
        if step.combine not in get_args(Combine):
            raise InputError(f"blocks side by side are combined by sum, mean or newton, not {step.combine!r}")
        most = len(step.blocks) if step.combine == "newton" else 1
        if type(step.rounds) is not int or not 1 <= step.rounds <= most:
            raise InputError(f"{len(step.blocks)} blocks by {step.combine} take 1 to {most} rounds, not {step.rounds}")
    found = replace(found, steps=steps)
    if found.uses > MOST_USES:
        raise InputError(f"an arrangement may run blocks {MOST_USES} times, not {found.uses}")
    if any(not 0 <= slot < found.uses for slot in found.extras):
        raise InputError(f"an arrangement of {found.uses} uses cannot have extras for use {max(found.extras)}")
    return found


def parse_arrangement(value: object) -> Arrangement:
    """An arrangement from JSON, which may be anything; ``InputError`` unless it is one in its canonical writing."""
    steps = value.get("steps") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(steps, list) or not set(value) <= {"steps", "extras"}:
        raise InputError("the artifact's arrangement must have steps, and nothing but steps and extras")
    if len(steps) > MOST_USES:
        raise InputError(f"the artifact's arrangement has {len(steps)} steps; at most {MOST_USES} are read")
    found = checked(Arrangement(tuple(map(_step, steps)), dict(_extras(value.get("extras", {})))))
    if found.renumbered()[1] != tuple(range(found.blocks)):
        raise InputError("the artifact's arrangement must number its blocks in the order of their first use")
    if found.written() != value:
        raise InputError("the artifact's arrangement is not written as layerwise writes it")
    return found


def _step(value: object) -> Step:
    if type(value) is int:
        return Step((value,))
    blocks = value.get("blocks") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(blocks, list) or not 2 <= len(blocks) <= MOST_USES:
        raise InputError("a step of the artifact's arrangement is a block, or several blocks and how they are combined")
    combine, rounds = value.get("combine"), value.get("rounds", 1)
    return Step(tuple(blocks), combine if isinstance(combine, str) else "", rounds)  # type: ignore[arg-type]


def _extras(value: object) -> Iterator[tuple[int, Extras]]:
    if not isinstance(value, Mapping):
        raise InputError("the extras of the artifact's arrangement must be by use")
    for slot, entry in value.items():
        own = entry.get("own") if isinstance(entry, Mapping) else None
        ranks = entry.get("corrections") if isinstance(entry, Mapping) else None
        if not (
            isinstance(slot, str)
            and slot.isascii()
            and slot.isdigit()
            and len(slot) < 6
            and isinstance(own, list)
            and all(isinstance(name, str) for name in own)
            and isinstance(ranks, Mapping)
            and all(isinstance(name, str) and type(rank) is int and rank > 0 for name, rank in ranks.items())
        ):
            raise InputError(f"the extras of use {slot} of the artifact's arrangement are damaged")
        yield int(slot), Extras(tuple(own), dict(ranks))
