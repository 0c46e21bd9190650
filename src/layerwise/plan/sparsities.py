"""Recipes of rising sparsity, over which rules that decide how sparse each matrix is are planned and measured."""

from __future__ import annotations

STEPS = (10, 20, 30, *(35 + 2.5 * i for i in range(23)), 95)  # per cent


def over(recipe: str) -> tuple[str, ...]:
    """``wanda`` or ``magnitude:pattern=matrix`` at every step, least sparse first."""
    joint = "," if ":" in recipe else ":"
    return tuple(f"{recipe}{joint}sparsity={step / 100}" for step in STEPS)
