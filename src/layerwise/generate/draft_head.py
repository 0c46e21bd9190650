"""A draft head: a small network that guesses the next feature of a large one, how it learns, and its file.

    feature f_i = norm(h_L) at position i, what the head of the network reads        e(t) = the network's own table
    u_i = W [e(t_{i+1}) / a ; f_i / b]        W [d, 2 d];  a, b: root mean squares of the table and of features
    g_{i+1} = block(u_1 … u_i)        one decoder block of the network's kind, its first norm left out
    scores of t_{i+2} = head(g_{i+1})        the network's own head

Tables may be a hundred times smaller than features, and W would take most of its training to make up for that: hence a
and b, which the paper does not have. W and the block are trained, table and head are the network's and stay as they
are. ``inputs`` are what u is made of; ``shifted`` as above, the others are what it is held against: ``unshifted`` takes
e(t_i) in the place of e(t_{i+1}), ``feature`` and ``token`` only the one or the other.

File (``head.safetensors``): ``fc.weight`` [d, 2 d], ``scales`` (a, b) and the block's own parameters, all fp16; what
the inputs are is in the header. It is read as a stranger's: names, shapes and types must be those of the head that this
network would have, and every value finite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from layerwise.errors import InputError
from layerwise.generate.network import CausalNetwork, by_columns
from layerwise.network import safetensors_file

FILE = "head.safetensors"
FORMAT = "layerwise draft head 1"
INPUTS = ("shifted", "unshifted", "feature", "token")
FIRST_NORMS = ("input_layernorm", "ln_1")
SAMPLED_WORDS = 1024  # of the table, for its root mean square
NOISE = 0.1  # features are off by at most this in training, as the head's own guesses will be
TOKEN_WEIGHT = 0.1  # of the cross-entropy beside the distance of features
LARGEST_GRADIENT = 0.5
WARM_UP = 0.1  # of the steps


class DraftHead(nn.Module):
    """The head that a network of this kind would have, with first weights drawn by the seed."""

    scales: Tensor

    def __init__(self, network: CausalNetwork, inputs: str = "shifted", seed: int = 0) -> None:
        super().__init__()
        self.inputs, width = inputs, width_of(network)
        config: Any = copy.copy(network.module.config)
        kind: Any = type(getattr(network.blocks[0], "inner", network.blocks[0]))
        self.fc = nn.Linear(2 * width, width, bias=False)
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are not kept
            self.block = kind(config, 0).float()
        for norm in FIRST_NORMS:
            if hasattr(self.block, norm):
                setattr(self.block, norm, nn.Identity())
        self.register_buffer("scales", scales_of(network))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    deviation = 1 / math.sqrt(3 * parameter.shape[-1])
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * deviation)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def mixed(self, embedded: Tensor, features: Tensor) -> Tensor:
        """u ``[…, d]`` from the embedding of a token and a feature; which token, the caller knows."""
        if self.inputs == "feature":
            embedded = torch.zeros_like(embedded)
        if self.inputs == "token":
            features = torch.zeros_like(features)
        out: Tensor = self.fc(torch.cat([embedded / self.scales[0], features / self.scales[1]], -1))
        return out


def width_of(network: CausalNetwork) -> int:
    """d, the width of the residual stream; a table in stored form does not tell."""
    return len(next(network.norm.parameters()))


@torch.no_grad()
def scales_of(network: CausalNetwork) -> Tensor:
    """Root mean squares of the table and, which is that of the last norm's weight, of features; float32 [2]."""
    words = torch.arange(min(network.words, SAMPLED_WORDS), device=network.device)
    parts = [network.table(words), next(network.norm.parameters())]
    return torch.stack([p.float().square().mean().sqrt().clamp(min=1e-3).cpu() for p in parts])


def as_network(network: CausalNetwork, head: DraftHead) -> CausalNetwork:
    """The network with the head's block in the place of its own, so that a session runs it over a cache."""
    return replace(network, blocks=(head.block,), windows=(None,))


# ---------------------------------------------------------------- learning


def train_head(
    network: CausalNetwork,
    head: DraftHead,
    tokens: Tensor,
    steps: int,
    batch: int,
    length: int,
    rate: float,
    seed: int,
    advance: Callable[[], None],
) -> list[float]:
    """Train on windows of a text, int64 [tokens], that the seed draws; return the loss of each step.

        loss = mean smooth-L1(g_{i+1}, f_{i+1}) + 0.1 CE(softmax head(f_{i+1}), softmax head(g_{i+1}))

    AdamW (0.9, 0.95), warm-up and cosine, gradient clipped at 0.5, uniform noise of ±0.1 on the features that go in.
    Raises ``InputError`` where the loss stops being a number.
    """
    if len(tokens) <= length:
        raise InputError(f"the text has {len(tokens)} tokens, and a window takes {length}; give more text")
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    computes_in = next(network.norm.parameters()).dtype
    network.module.requires_grad_(False)
    head.train()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - length + 1, (batch,), generator=draw).tolist()
        windows = torch.stack([tokens[s : s + length] for s in starts])
        features, embedded, wanted = recorded(network, windows, head.inputs)
        noise = (torch.rand(features.shape, generator=draw) * 2 - 1) * NOISE
        share = (step + 1) / steps
        for group in optimiser.param_groups:
            group["lr"] = rate * min(share / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share) + 1e-3)
        guessed = run_block(
            network, head, head.mixed(embedded, features[:, :-1] + noise[:, :-1].to(features))
        )  # [n, t - 1, d]
        scores = network.head(guessed.to(computes_in)).float()
        if not scores.requires_grad:
            raise InputError(
                "a network in stored form cannot be learned from; fit the head on the checkpoint that it was made "
                "from, and use it with both"
            )
        loss = smooth_l1_loss(guessed, features[:, 1:]) + TOKEN_WEIGHT * cross_entropy(
            scores.flatten(0, 1), wanted.flatten(0, 1)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(head.parameters()), LARGEST_GRADIENT)
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise InputError(f"training of the head came apart at step {step + 1}; give it a smaller rate")
        advance()
    head.eval()
    return losses


@torch.no_grad()
def recorded(network: CausalNetwork, windows: Tensor, inputs: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, t, d], embeddings beside them [n, t - 1, d], and what the network says [n, t - 1, words]."""
    rows, length = windows.shape
    session = network.session(rows, length)
    hidden = session.run(session.embed(windows, [0] * rows), range(len(network.blocks)), [0] * rows)
    features = network.norm(hidden)
    beside = windows[:, :-1] if inputs == "unshifted" else windows[:, 1:]
    embedded = network.table(beside.to(network.device))
    return features.float(), embedded.float(), network.head(features[:, 1:]).float().softmax(-1)


def run_block(network: CausalNetwork, head: DraftHead, mixed: Tensor) -> Tensor:
    """Guessed features ``[rows, count, d]`` of whole windows, without a cache, so that they can be learned from."""
    count = mixed.shape[1]
    arguments: dict[str, Any] = {"position_ids": torch.arange(count, device=mixed.device)[None]}
    if network.rotary is not None:
        arguments["position_embeddings"] = network.rotary(mixed[:1], arguments["position_ids"])
    out = head.block(mixed, attention_mask=None, **arguments)
    guessed: Tensor = out[0] if isinstance(out, tuple) else out
    return guessed


# ---------------------------------------------------------------- file


def save_head(head: DraftHead, folder: Path) -> int:
    """Write ``head.safetensors`` into a folder and return its bytes."""
    values = {name: value.half() for name, value in head.state_dict().items()}
    layout = {name: (torch.float16, tuple(value.shape)) for name, value in values.items()}
    metadata = {"format": FORMAT, "inputs": head.inputs}
    return safetensors_file.write(folder / FILE, layout, values.items(), metadata)


def load_head(network: CausalNetwork, folder: Path) -> DraftHead:
    """The head in a folder, in the network's type and on its device. Raises ``InputError`` for one that is not its."""
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} holds no draft head; make one with: layerwise fit eagle MODEL {folder} --text TEXT")
    tensors, metadata = safetensors_file.read_header(folder / FILE)
    if metadata.get("format") != FORMAT or metadata.get("inputs") not in INPUTS:
        raise InputError(f"{folder / FILE} is no draft head of this version; its header must say {FORMAT!r}")
    head = DraftHead(network, metadata["inputs"])
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(info.shape) for name, info in tensors.items()}
    if wanted != found or any(info.dtype != torch.float16 for info in tensors.values()):
        other = next((n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)), "its type")
        raise InputError(f"{folder / FILE} is the head of another network: {other} does not fit this {network.name}")
    values = {name: safetensors_file.read(info).float() for name, info in tensors.items()}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{folder / FILE} holds values in {name} that are no numbers")
    head.load_state_dict(values)
    like = next(network.norm.parameters())
    head = head.to(like.device, like.dtype).eval().requires_grad_(False)
    by_columns(head)
    return head
