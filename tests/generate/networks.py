"""Small random networks in float64, drafts of every quality, and a cache made anew: what generators are tested with."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.engine.progress import Stopwatch
from layerwise.generate.choice import Chooser
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.generate.session import Session
from layerwise.generate.speculation import Proposal
from layerwise.recipe import parse_generator
from layerwise.roles import Generator

WORDS = 41
STOP = 1
KINDS = ("llama", "gpt2", "mistral", "mixtral", "qwen2_moe")


@cache
def network(kind: str, blocks: int = 4, words: int = WORDS) -> CausalNetwork:
    """A random network of ``blocks`` blocks whose choices depend on everything before them, in float64."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": words, "num_hidden_layers": blocks, "num_attention_heads": 4, "hidden_size": 32,
        "max_position_embeddings": 160, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": STOP,
        "pad_token_id": 0,
    }  # fmt: skip
    decoder = common | {"intermediate_size": 48, "num_key_value_heads": 2}
    of_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    own, name = {
        "llama": (decoder, "LlamaForCausalLM"),
        "gpt2": (common, "GPT2LMHeadModel"),
        "mistral": ({**decoder, "sliding_window": 9}, "MistralForCausalLM"),
        "mixtral": ({**decoder, "num_local_experts": 3}, "MixtralForCausalLM"),
        "qwen2_moe": ({**decoder, **of_experts, "shared_expert_intermediate_size": 24}, "Qwen2MoeForCausalLM"),
    }[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**own)
    config._experts_implementation = "eager"  # the grouped product of torch knows no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = cls(config).double().eval().requires_grad_(False)
    return causal_network(made)


BRIEFLY = {"steps": 2, "batch": 2, "length": 16, "windows": 6}
LEARNED = tempfile.TemporaryDirectory(prefix="layerwise-")  # removed when the tests end


@cache
def ready(setting: str, kind: str = "llama") -> Generator:
    """A generator that has learned, briefly and from random tokens, what it must about a random network."""
    found = parse_generator(setting)
    if not found.learns:
        return found
    brief = {f.name: BRIEFLY[f.name] for f in fields(found) if f.name in BRIEFLY}  # type: ignore[arg-type]
    folder = Path(tempfile.mkdtemp(dir=LEARNED.name))
    tokens = torch.randint(2, WORDS, (200,), generator=torch.Generator().manual_seed(1))
    return replace(found, **brief).learn(network(kind), tokens, folder, 0, Stopwatch())  # type: ignore[type-var]


def prompts(count: int = 3, seed: int = 0, longest: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(2, WORDS, (n,), generator=draw).tolist() for n in lengths]


@torch.inference_mode()
def greedy_without_cache(net: CausalNetwork, prompt: Sequence[int], count: int, stop: bool = True) -> tuple[int, ...]:
    """Plain greedy decoding by transformers' own forward over the whole text, again for every token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(net.module(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if stop and text[-1] in net.stop:
            break
    return tuple(text[len(prompt) :])


@torch.inference_mode()
def cache_of(net: CausalNetwork, text: Sequence[int], kind: str = "16") -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block over a text, computed in one pass."""
    session = net.session(1, len(text), kind)
    session.prefill([text])
    return [session.cache.read(block, len(text)) for block in range(len(net.blocks))]


@dataclass
class Scripted:
    """A draft that proposes what a function of the text so far says; ``told`` is what was confirmed to it."""

    choose: Any  # text -> token
    text: list[int]
    told: list[int] = field(default_factory=list)

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        so_far = [*self.text, *self.told]
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(self.choose([*so_far, *tokens]))
        return Proposal(tokens)

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        assert hidden.shape[1] >= len(tokens)
        self.told += tokens


@dataclass
class Always:
    """The same number of drafts each round."""

    number: int
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def count(self) -> int:
        return self.number

    def seen(self, drafted: int, accepted: int) -> None:
        self.rounds.append((drafted, accepted))
