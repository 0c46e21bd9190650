"""Budgets as the user writes them: ``4.5bpw``, ``12MB``, ``12.5MiB``, ``1234567B``, ``25%``; and tolerated loss.

    bpw    8 * size / dense parameters; size is that of all safetensors files, headers included
    %      share of the input's safetensors as stored
    B      bytes; kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB powers of 1024

A number without a unit is refused: 4 may mean bits or megabytes. So is ``Mb``, which elsewhere means megabits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from layerwise.errors import InputError

HOW = "write it as 4.5bpw, 12MB, 12.5MiB, 1234567B or 25%"
HOW_LOSS = "write it as 1% (perplexity), kl:0.01 or distance:0.01"
LARGEST = 1 << 60  # bytes
LARGEST_BPW = 32
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
UNITS = {f"{p}b": 1000**n for p, n in POWERS.items()} | {f"{p}ib": 1024**n for p, n in POWERS.items() if p}
TIME_UNITS = {"ns", "us", "µs", "ms", "s", "sec", "seconds", "tok/s", "tokens/s"}


@dataclass(frozen=True)
class Budget:
    """How large the result may be. ``amount`` is in bytes, bits per dense parameter, or a share of the input."""

    text: str
    amount: Decimal
    unit: Literal["bytes", "bpw", "share"]

    def __str__(self) -> str:
        return self.text

    def bytes(self, dense_parameters: int, input_bytes: int) -> int:
        """The budget in whole bytes, rounded down."""
        if self.unit == "bytes":
            return int(self.amount)
        if self.unit == "bpw":
            return int(self.amount * dense_parameters / 8)
        return int(self.amount * input_bytes)


@dataclass(frozen=True)
class QualityLoss:
    """How much worse the result may be: a relative rise of perplexity, or a mean KL or squared distance."""

    text: str
    amount: float
    measure: Literal["perplexity", "kl", "distance"]

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """Read ``--budget``; raises ``InputError`` for anything that is not a size."""
    word = _short(text, "budget", HOW)
    if re.match(r"(kl|distance|perplexity|quality)\b", word, re.IGNORECASE):
        raise InputError(f"budget {text!r} is a tolerated loss of quality; give it as --quality-loss {word}")
    number, unit = _split(word, "budget", HOW)
    if unit.casefold() in TIME_UNITS or re.match(r"(latency|time|speed)\b", word, re.IGNORECASE):
        raise InputError(f"budget {text!r} is a latency budget, which is not supported yet; {HOW}")
    if number is None:
        raise InputError(f"budget {text!r} is not a size; {HOW}")
    if not unit:
        raise InputError(f"budget {text!r} has no unit; {HOW}")
    if number <= 0:
        raise InputError(f"budget {text!r} must be more than zero; {HOW}")
    if unit == "%":
        if number > 100:
            raise InputError(f"budget {text!r} is larger than the input; a share is at most 100%")
        return Budget(word, number / 100, "share")
    if unit.casefold() == "bpw":
        if number > LARGEST_BPW:
            raise InputError(f"budget {text!r} is more than a float32 weight takes; give at most {LARGEST_BPW}bpw")
        return Budget(word, number, "bpw")
    if unit.casefold() not in UNITS or (unit[-1] == "b" and unit != unit.casefold()):
        raise InputError(f"budget {text!r} has the unknown unit {unit!r}; {HOW}")
    amount = number * UNITS[unit.casefold()]
    if amount > LARGEST:
        raise InputError(f"budget {text!r} is larger than any network; {HOW}")
    if amount < 1:
        raise InputError(f"budget {text!r} is less than one byte; {HOW}")
    return Budget(word, amount, "bytes")


def parse_quality_loss(text: str) -> QualityLoss:
    """Read ``--quality-loss``: ``1%`` rise of perplexity, ``kl:x`` or ``distance:x``, the mean over steering text."""
    word = _short(text, "quality loss", HOW_LOSS)
    measure, colon, rest = word.partition(":")
    measure = measure.strip().casefold() if colon else "perplexity"
    if measure in ("latency", "time", "speed"):
        raise InputError(f"quality loss {text!r} is a latency budget, which is not supported yet; {HOW_LOSS}")
    number, unit = _split(rest.strip() if colon else word, "quality loss", HOW_LOSS)
    if number is None or measure not in ("perplexity", "kl", "distance"):
        raise InputError(f"quality loss {text!r} is not known; {HOW_LOSS}")
    if unit != ("%" if measure == "perplexity" else ""):
        raise InputError(f"quality loss {text!r} has the wrong unit; {HOW_LOSS}")
    if number <= 0:
        raise InputError(f"quality loss {text!r} must be more than zero; {HOW_LOSS}")
    if number > 100:
        raise InputError(f"quality loss {text!r} would leave nothing of the network; give at most 100")
    amount = float(number / 100 if measure == "perplexity" else number)
    return QualityLoss(word, amount, measure)  # type: ignore[arg-type]


def check_reachable(budget: int, smallest: int, largest: int, text: str = "") -> int:
    """The budget in bytes, if plans from ``smallest`` to ``largest`` bytes exist around it; else ``InputError``."""
    asked = f"budget {text} ({budget} bytes)" if text else f"budget of {budget} bytes"
    if budget < smallest:
        raise InputError(f"{asked} is too small; the smallest feasible budget is {smallest} bytes")
    if budget > largest:
        raise InputError(f"{asked} is above the {largest} bytes of the network at 16 bits; give at most {largest}B")
    return budget


def _short(text: str, what: str, how: str) -> str:
    word = text.strip()
    if not word or len(word) > 64:
        raise InputError(f"{what} {word[:64]!r} is {'empty' if not word else 'too long'}; {how}")
    return word


def _split(word: str, what: str, how: str) -> tuple[Decimal | None, str]:
    """Number and unit; no number where the text does not begin with one."""
    found = NUMBER.match(word)
    if found is None:
        if re.match(r"[+-]?(nan|inf)", word, re.IGNORECASE):
            raise InputError(f"{what} {word!r} is not a finite number; {how}")
        return None, word
    try:
        return Decimal(found.group()), word[found.end() :].strip()
    except InvalidOperation:
        raise InputError(f"{what} {word!r} is not a number; {how}") from None
