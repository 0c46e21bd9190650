"""Steps stored as 8-bit floats (E4M3) times one power of two for the whole matrix.

E4M3 has a sign, four bits of exponent (bias 7) and three of mantissa: from 2^-9 (subnormal) to 448, no infinity; code
127 is not a number. A step is one of its 126 positive numbers, codes 1 to 126, so steps of a matrix span 17 octaves at
a relative distance of at most 1/8. Small weights would fall off the lower end, hence the power

    step = e4m3(code) * 2^-i,      i = argmin over 0..14 of  sum over groups of max(2^-6 - 2^i t_g, 0)

with ``t_g`` the step that group g wants: the smallest i of equals, and none with ``2^i t_g middle > 448``, for a kernel
that turns ``code * step`` itself into E4M3. That is the underflow guard of FireQ (arXiv 2505.20839) but for the floor:
theirs is 2^-9, the smallest number at all, ours 2^-6, below which numbers have fewer than three bits of mantissa
(measured on normal weights of 0.02, steps rounded up: 27 % more squared error than with exact steps with their floor,
less than 20 % with ours). Ours, too: where even i = 0 is too large, i goes below zero, down to -15, so that what fp16
steps could hold is held.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6  # below it, down to 2^-9, numbers lose bits
TOP_CODE = 126
POWERS = (*range(15), *range(-1, -16, -1))  # in the order of preference


@cache
def _values() -> Tensor:
    """code 0..127 -> number, float32 [128]; the last is NaN."""
    code = torch.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    values = torch.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values[TOP_CODE + 1] = torch.nan
    return values.float()


def float8_values(codes: Tensor) -> Tensor:
    """The numbers of positive E4M3 codes (uint8, at most 127): float32."""
    return _values().to(codes.device)[codes.long()]


def float8_above(value: Tensor) -> Tensor:
    """Codes of the smallest positive E4M3 numbers not below ``value`` (at most the largest): uint8."""
    codes = torch.searchsorted(_values()[1 : TOP_CODE + 1].contiguous(), value.float().contiguous()) + 1
    return codes.clamp(max=TOP_CODE).to(torch.uint8)


def guarded_power(wanted: Tensor, middle: int) -> Tensor:
    """``2^-i`` for the steps ``wanted`` (any shape; zeros are ignored) of a grid with this middle code: fp16 [1]."""
    steps = wanted[wanted > 0].double()
    if not steps.numel():
        return torch.ones(1, dtype=torch.float16)
    best, least = POWERS[-1], float("inf")
    largest = float(steps.max())
    for power in POWERS:
        if power < 0 and least < float("inf"):
            break
        if largest * 2.0**power * middle > LARGEST:
            continue
        score = float((SMALLEST_NORMAL - steps * 2.0**power).clamp(min=0).sum())
        if score < least:
            best, least = power, score
    return torch.tensor([2.0**-best]).half()
