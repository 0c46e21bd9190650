"""Whether values are finite, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A NaN or an infinity never leaves a sum, so a finite sum answers without the copies that an elementwise test makes;
    a sum may also overflow, and then each value is looked at.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
