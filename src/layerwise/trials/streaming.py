"""What ``layerwise bench`` measures of generators that read blocks from disk: memory, and time on the clock.

Prompts are decoded greedily, one by one and all side by side, by the network in memory and by each setting in turn, all
on one thread, from a file that the system has in its page cache (it was read before). Tokens must be the same.

memory   bytes of blocks that are in memory at one time at most, over those of all blocks
time     on the clock, the network in memory = 1; and, where a setting reads ahead, beside the same without
waiting  seconds a new token that computing stands still for reading
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layerwise.generate.wanted import Generation, Wanted, silent
from layerwise.jobs.generating import open_speaker
from layerwise.recipe import parse_generator
from layerwise.roles import Generator
from layerwise.trials.by_loss import Figures, Ground, Side, Trial

NEW_TOKENS = 32
PLAIN = "plain"


def streaming_trials(ground: Ground, settings: Sequence[Generator], prompts: Sequence[list[int]]) -> list[Trial]:
    model = ground.prepared.options.model
    whole, streamed = open_speaker(model).network, open_speaker(model, streamed=True).network
    ways: dict[str, tuple[Generator, Any]] = {PLAIN: (parse_generator(PLAIN), whole)}
    ways |= {str(setting): (setting, streamed) for setting in settings}
    seconds: dict[tuple[str, bool], float] = {}
    found: dict[tuple[str, bool], list[Generation]] = {}
    with ground.watch.stage(f"generate by {len(ways)} settings", 2 * len(ways)) as advance:
        for together in (False, True):
            for name, (generator, network) in ways.items():
                groups = [list(prompts)] if together else [[prompt] for prompt in prompts]
                began = time.perf_counter()
                made = [generator.generate(network, g, Wanted(NEW_TOKENS, ignore_stop=True), silent) for g in groups]
                seconds[name, together] = time.perf_counter() - began
                found[name, together] = made
                if [m.tokens for m in made] != [m.tokens for m in found[PLAIN, together]]:
                    raise AssertionError(f"{name} gave other tokens than the network in memory")
                advance()
    size, trials = ground.network.checkpoint.safetensors_bytes, []

    def trial(name: str, other: str, metric: str, value: float, against: float) -> None:
        trials.append(Trial(Side(name, size, None), Side(other, size, None), Figures(metric, value, against)))

    def waited(name: str) -> float:
        taken: list[Any] = [m.notes["waited_seconds"] for m in found[name, False]]
        return float(sum(taken)) / len(prompts) / NEW_TOKENS

    for setting in settings:
        name = str(setting)
        notes: dict[str, Any] = found[name, False][0].notes
        trial(name, PLAIN, "blocks in memory at most, over all", notes["held_bytes"] / notes["block_bytes"], 1.0)
        for together in (False, True):
            how = "all prompts side by side" if together else "prompts one by one"
            mine, plain = seconds[name, together], seconds[PLAIN, together]
            trial(name, PLAIN, f"time, {how}, network in memory = 1", mine / plain, 1.0)
            if getattr(setting, "ahead", False):
                other = str(replace(setting, ahead=False))  # type: ignore[type-var]
                if (other, together) in seconds:
                    trial(
                        name,
                        other,
                        f"time, {how}, network in memory = 1",
                        mine / plain,
                        seconds[other, together] / plain,
                    )
        if getattr(setting, "ahead", False) and (other := str(replace(setting, ahead=False))) in ways:  # type: ignore[type-var]
            trial(name, other, "seconds a token that reading is waited for", waited(name), waited(other))
    return trials
