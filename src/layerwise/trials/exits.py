"""What ``layerwise bench`` measures of training for early exits: the network is its own student.

Each setting starts from the ground's network and has as many steps of as many sequences of the calibration text, drawn
alike. Measured on the held-out text, smaller is better:

nats a token    of the next tokens, read behind every block through the network's own norm and head
refused         share of four drafts a round by the first blocks that verification refuses (``self_speculative``)
full passes     of the whole network a new token, with the same drafts; plain decoding's is 1
"""

from __future__ import annotations

from dataclasses import replace

import torch

from layerwise.distill.inherit import inherit
from layerwise.distill.text import TextLesson
from layerwise.generate.network import causal_network
from layerwise.generate.wanted import Wanted, silent
from layerwise.network.load import load
from layerwise.recipe import parse_generator
from layerwise.trials.by_loss import Figures, Ground, Side, Trial
from layerwise.trials.distillers import NATS, Study, half_bytes, settings, train_and_judge
from layerwise.trials.generators import FULL, PROMPT_TOKENS, REFUSED, prompts_of

PROMPTS, NEW_TOKENS = 4, 48
RATE = 0.0003  # of a network that is trained already


def exit_trials(ground: Ground, technique: str, study: Study) -> list[Trial]:
    """Every exit against the same exit of each rival."""
    mine, rivals = settings(technique, study.steps, study.sequences, RATE)
    teacher = load(ground.network.checkpoint.directory, dtype=torch.float32)
    loss, held = ground.prepared.loss, ground.prepared.evaluation.batches
    train, judge = train_and_judge(ground, replace(study, steps=mine.steps))
    found: dict[str, tuple[int, list[float], dict[int, tuple[float, float]]]] = {}
    for distiller in (mine, *rivals):
        student = inherit(teacher)
        lesson = TextLesson(student, teacher, loss, train, judge, distiller.sequences, ground.prepared.options.seed)
        with ground.watch.stage(str(distiller), max(1, distiller.steps)) as advance:
            lesson.stepped = advance
            distiller.distill(lesson)
        nats = nats_of_exits(TextLesson(student, teacher, loss, held, (), 8), study.held_out)
        drafts = {depth: drafted(ground, student, depth) for depth in drafting(len(nats))}
        found[str(distiller)] = half_bytes(student), nats, drafts
    trials = []
    size, nats, drafts = found[str(mine)]
    for rival in rivals:
        _, others, their = found[str(rival)]
        rows = [(NATS, f"read behind block {i + 1}", nats[i], others[i]) for i in reversed(range(len(nats)))]
        for place, metric in enumerate((REFUSED, FULL)):
            rows += [(metric, f"the first {d} draft", drafts[d][place], their[d][place]) for d in drafts]
        trials += [
            Trial(
                Side(f"{mine}, {said}", size, None), Side(f"{rival}, {said}", size, None), Figures(metric, own, other)
            )
            for metric, said, own, other in rows
        ]
    return trials


def drafting(blocks: int) -> list[int]:
    """How many first blocks draft: half and three quarters; the first exit has no weight in the recipe."""
    return sorted({max(1, blocks // 2), max(1, 3 * blocks // 4)})


@torch.inference_mode()
def nats_of_exits(lesson: TextLesson, sequences: int) -> list[float]:
    sums, terms, seen = [0.0] * len(lesson.names), 0, 0
    for part in range(lesson.parts):
        if seen >= sequences:
            break
        labels, states = lesson.labels(part), lesson.see(lesson.student, part).states
        assert labels is not None
        for place, state in enumerate(states):
            output = lesson.finish(state, part, lesson.student)
            sums[place] += float(torch.nn.functional.cross_entropy(output, labels, reduction="sum"))
        terms, seen = terms + int((labels >= 0).sum()), seen + len(lesson.batches[part].tokens)
    return [value / terms for value in sums]


def drafted(ground: Ground, module: torch.nn.Module, depth: int) -> tuple[float, float]:
    """(share of drafted tokens that are refused, full passes a token) when the first ``depth`` blocks draft."""
    network = causal_network(module)
    generator = parse_generator(f"self_speculative:draft=exit,exit={depth},tokens=4,floor=0.0")
    refused = drafts = passes = tokens = 0
    for prompt in prompts_of(ground, network)[:PROMPTS]:
        found = generator.generate(network, [prompt[:PROMPT_TOKENS]], Wanted(NEW_TOKENS, ignore_stop=True), silent)
        drafts, refused = drafts + found.work.drafted, refused + found.work.drafted - found.work.accepted
        passes, tokens = passes + found.work.full_passes, tokens + len(found.tokens[0]) - 1
    return refused / max(1, drafts), passes / max(1, tokens)
