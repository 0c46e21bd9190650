"""Depths: which blocks run for which token or text, as a config says it.

    "depths": {"rule": "tokens", "blocks": [2, 3], "threshold": 0.5}
    "depths": {"rule": "exit", "threshold": 0.5, "inner": 32}
    "depths": {"rule": "gate", "inner": 32}

tokens  each of ``blocks`` has a router: a token whose score is not above ``threshold`` passes the block by
exit    behind every block a head says how likely this is the last one needed; a text leaves once the sum passes
        ``threshold``
gate    behind the first block a head says how many blocks the text needs

How they run is ``adaptive.py``. ``inner`` is the width of the head's hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from layerwise.errors import InputError

Rule = Literal["tokens", "exit", "gate"]
WIDEST = 1 << 12  # of a head's hidden layer: a config cannot make us build more


@dataclass(frozen=True)
class Depths:
    """A rule and its settings; those that a rule does not have are left at zero."""

    rule: Rule
    blocks: tuple[int, ...] = ()
    threshold: float = 0.0
    inner: int = 0

    @property
    def of_texts(self) -> bool:
        """Whether whole texts leave, so that a block cannot be run without those before it."""
        return self.rule != "tokens"

    def written(self) -> dict[str, Any]:
        """As JSON."""
        if self.rule == "tokens":
            return {"rule": self.rule, "blocks": list(self.blocks), "threshold": self.threshold}
        if self.rule == "exit":
            return {"rule": self.rule, "threshold": self.threshold, "inner": self.inner}
        return {"rule": self.rule, "inner": self.inner}


def checked(depths: Depths, count: int) -> Depths:
    """The same, or ``InputError`` where a network of ``count`` blocks cannot run so."""
    if any(not 1 <= block < count for block in depths.blocks):
        raise InputError(f"tokens can pass by blocks 1 to {count - 1} of {count}, not {list(depths.blocks)}")
    if depths.of_texts and count < 2:
        raise InputError("texts can leave a network of two blocks or more, not one of a single block")
    return depths


def parse_depths(value: object) -> Depths:
    """Depths from JSON, which may be anything; ``InputError`` unless they are in their canonical writing."""
    rule = value.get("rule") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or rule not in get_args(Rule):
        raise InputError(f"the artifact's depths must have one of the rules {', '.join(get_args(Rule))}, not {rule!r}")
    blocks, threshold, inner = value.get("blocks", []), value.get("threshold", 0.0), value.get("inner", 0)
    sound = (
        isinstance(blocks, list)
        and all(type(block) is int for block in blocks)
        and blocks == sorted(set(blocks))
        and type(threshold) is float
        and 0 <= threshold <= 1
        and type(inner) is int
        and (0 if rule == "tokens" else 1) <= inner <= WIDEST
    )
    found = Depths(cast("Rule", rule), tuple(blocks), threshold, inner) if sound else None
    if found is None or found.written() != dict(value) or (rule == "tokens" and not found.blocks):
        raise InputError("the artifact's depths are damaged, or not written as layerwise writes them")
    return found
