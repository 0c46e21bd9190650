"""What scaling rotary pairs is for: the loss of a LLaMA-like network whose rotated keys are rounded, with and without.

    python benchmarks/rotary_keys.py NETWORK --calibrate TEXT --evaluate TEXT [--strengths 0 0.5] [--bits 4 3] [--json]

Nothing else is rounded: after rotation every key becomes integers with one scale a token and head. Printed is the KL to
the dense network per token, for each strength of ``fireq_rope``; ``exact`` is the KL with no key rounded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding.inputs import TokenGrid
from layerwise.engine.machine import versions
from layerwise.network.folds import BlockScope
from layerwise.network.load import load
from layerwise.network.rotary_pairs import RotaryPairs
from layerwise.quantize.fireq_rope import FireqRope

ROTATION = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
LENGTH = 128
QUERIES, KEYS = "self_attn.q_proj", "self_attn.k_proj"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with torch.inference_mode():
        module = load(given.network, dtype=torch.float32)
        calibrate, evaluate = (
            windows(given.network, path, given.sequences) for path in (given.calibrate, given.evaluate)
        )
        wanted, scopes = logits(module, evaluate), scopes_of(module, calibrate)
        found: dict[float, list[float]] = {}
        for strength in given.strengths:
            for block, scope in zip(module.model.layers, scopes, strict=True):  # type: ignore[union-attr, arg-type]
                for name, value in FireqRope(strength=strength).rewrite(scope).parameters.items():
                    block.get_parameter(name).data = value
            line = [kl(wanted, logits(module, evaluate))]
            for bits in given.bits:
                with patch(ROTATION, rounding(bits)):
                    line.append(kl(wanted, logits(module, evaluate)))
            found[strength] = line
    if given.json:
        print(json.dumps({"strengths": found, "bits": given.bits, **versions()}))
        return 0
    print(f"{'strength':<10}{'exact':>12}" + "".join(f"{f'{bits} bits':>12}" for bits in given.bits))
    for strength, line in found.items():
        print(f"{strength:<10}" + "".join(f"{value:12.5g}" for value in line))
    return 0


def windows(network: str, text: str, count: int) -> Tensor:
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(network)(Path(text).read_text(encoding="utf-8")).input_ids
    return torch.tensor(tokens[: count * LENGTH]).view(-1, LENGTH)


def logits(module: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([module(batch, use_cache=False).logits for batch in tokens.split(8)]).log_softmax(-1)


def kl(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def rounding(bits: int) -> Callable[..., tuple[Tensor, Tensor]]:
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def rotated(q: Tensor, k: Tensor, *rest: Tensor, **named: int) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *rest, **named)
        return q, TokenGrid(bits).rounded(k)

    return rotated


def scopes_of(module: nn.Module, tokens: Tensor) -> list[BlockScope]:
    """Every block with the second moments of what its keys are made of."""
    blocks = list(module.model.layers)  # type: ignore[union-attr, arg-type]
    moments: dict[int, Tensor] = {}

    def note(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            moments[index] = moments.get(index, torch.zeros(())) + x.T @ x / tokens.numel()

        return hook

    handles = [b.get_submodule(KEYS).register_forward_pre_hook(note(i)) for i, b in enumerate(blocks)]
    logits(module, tokens)
    for handle in handles:
        handle.remove()
    scopes = []
    for index, block in enumerate(blocks):
        keys, moment = block.get_submodule(KEYS), moments[index]
        use = Use(torch.ones(len(keys.weight)), moment, moment, moment.diagonal().sqrt(), 1.0, tokens.numel())
        width = block.self_attn.head_dim
        pairs = RotaryPairs(QUERIES, KEYS, len(keys.weight) // width, width, False)
        parameters = {name: value.data for name, value in block.named_parameters()}
        fit = {KEYS: SiteStatistics((use,))}
        scopes.append(BlockScope("block", parameters, frozenset(), fit, dict(fit), (), (pairs,)))
    return scopes


if __name__ == "__main__":
    raise SystemExit(main())
