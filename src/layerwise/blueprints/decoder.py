"""The decoder that blueprints start from and ship as: transformers' ``LlamaForCausalLM``, with nothing of its own.

Pre-norm blocks with RMSNorm, rotary positions, full multi-head attention and SwiGLU; no biases; table and head apart.
With d = width, f = inner, L blocks and V words it has

    2 V d + L (4 d^2 + 3 d f + 2 d) + d        parameters

Weights are drawn from one generator, name by name, normal with deviation 0.02, those that write into the residual
stream (``o_proj``, ``down_proj``) with 0.02 / sqrt(2 L); norms begin at one. The global generator is left as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DEVIATION = 0.02
EPSILON = 1e-5  # of the norms
WRITERS = ("o_proj", "down_proj")  # linears that write into the residual stream


@dataclass(frozen=True)
class Size:
    """How large a decoder is.

    vocabulary: words of the tokenizer.      width:   of the residual stream.
    inner:      width of the feed-forward.   context: longest sequence.
    """

    vocabulary: int = 512
    width: int = 128
    inner: int = 352
    blocks: int = 3
    heads: int = 4
    context: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} must be at least 1, not {getattr(self, field.name)}")
        if self.width % (2 * self.heads):
            raise InputError(
                f"width {self.width} cannot be divided into {self.heads} heads of an even width, which rotary "
                f"positions need; choose a multiple of {2 * self.heads}"
            )


def plain_parameters(size: Size) -> int:
    """Parameters of the plain decoder, by the formula above."""
    block = 4 * size.width**2 + 3 * size.width * size.inner + 2 * size.width
    return 2 * size.vocabulary * size.width + size.blocks * block + size.width


def empty_decoder(size: Size) -> LlamaForCausalLM:
    """The plain decoder in float32 with weights that are still to be set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.blocks, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=size.context, rms_norm_eps=EPSILON, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are not kept
        return LlamaForCausalLM(config).float()


def drawn_decoder(size: Size, seed: int) -> LlamaForCausalLM:
    """The plain decoder with its first weights."""
    module = empty_decoder(size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            writes = name.removesuffix(".weight").rpartition(".")[2] in WRITERS
            deviation = DEVIATION / math.sqrt(2 * size.blocks) if writes else DEVIATION
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return module


def inner_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linears inside the blocks by name: the head is not one of them."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def replace_module(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``."""
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, new)


def filled_decoder(size: Size, state: dict[str, Tensor]) -> LlamaForCausalLM:
    """The plain decoder with these weights, each rounded to the fp16 in which it is stored; in eval mode."""
    module = empty_decoder(size)
    module.load_state_dict({name: value.detach().half().float() for name, value in state.items()})
    return module.eval()


def size_of(module: nn.Module) -> Size:
    """The size of a decoder that was built here."""
    c: Any = module.config
    return Size(
        c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
        c.max_position_embeddings,
    )  # fmt: skip
