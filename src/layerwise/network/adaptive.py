"""Blocks that run for some tokens or texts only.

The network's own blocks stay its blocks, with their class extended: before a block runs, its rule says for which tokens
or texts, and the others keep the hidden state that they have. What is left out is not computed.

    layers.<i>.depth.weight [d], .bias [1]                      router of block i (rule ``tokens``)
    layers.0.depth.inner.weight [m, k d], .inner.bias [m]       head (rules ``exit``: k = 2, o = 1; ``gate``: k = 1,
    layers.0.depth.outer.weight [o, m], .outer.bias [o]         o = number of blocks), used behind every block

tokens  r = sigmoid(w · ĥ + b), ĥ = h / rms(h). The tokens with r > threshold are a sequence of their own, at their own
        positions; among them the block runs, and h <- h + r (block(h) - h). Its KV cache holds those tokens only.
exit    lambda_i = sigmoid(head([s_i + e_i ; s_{i-1} + e_{i-1}])), s_i the mean state of a text's tokens behind block i
        over its rms, s_0 = 0, e_i a hundredth of the sinusoidal code of i; F_i = F_{i-1} + lambda_i (1 - F_{i-1}).
        A text leaves behind the first block with F_i >= threshold.
gate    the largest of the head's scores, read behind the first block, is the number of blocks that the text runs.

The first block always runs. A text that leaves goes through what follows the blocks as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.depths import Depths, checked

if TYPE_CHECKING:
    from layerwise.network.network import Network

CACHES = ("past_key_values", "past_key_value", "layer_past")
KEPT = "_layerwise_kept"  # on a cache object: block -> positions whose keys and values it holds


@dataclass
class Running:
    """What the blocks of one network share.

    ran:      how many blocks ran for each text of the last forward, or (tokens) for how many tokens each block ran.
    share:    while routers are trained: the share of tokens, besides the ``protected`` last ones, that the best scores
              take, in place of the threshold. ``routed`` then has (scores before the sigmoid, chosen) of each block.
    fixed:    instead of an exit or a gate: how many blocks each text runs.
    """

    depths: Depths
    blocks: list[nn.Module]
    values: int = 0
    alive: Tensor = field(default_factory=lambda: torch.empty(0))
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    before: Tensor = field(default_factory=lambda: torch.empty(0))
    ran: Tensor = field(default_factory=lambda: torch.empty(0))
    share: float | None = None
    protected: int = 0
    routed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fixed: Tensor | None = None


def running_of(module: nn.Module) -> Running | None:
    """What the blocks of a network share, where they run adaptively."""
    return next((m.__dict__["adapt"][0] for m in module.modules() if "adapt" in m.__dict__), None)


def adapt_module(module: nn.Module, depths: Depths) -> Running:
    """Let a module's blocks run so; parameters of routers and heads are empty and of the blocks' type."""
    from layerwise.network.sites import find_blocks

    blocks = [module.get_submodule(path) for path in find_blocks(module)]
    checked(depths, len(blocks))
    width, like = int(module.config.hidden_size), next(blocks[0].parameters())  # type: ignore[union-attr, arg-type]
    for routed in depths.blocks:
        blocks[routed].add_module("depth", _parameters({"weight": (width,), "bias": (1,)}, like))
    if depths.of_texts:
        read, said = (2 * width, 1) if depths.rule == "exit" else (width, len(blocks))
        head = nn.Module()
        head.add_module("inner", _parameters({"weight": (depths.inner, read), "bias": (depths.inner,)}, like))
        head.add_module("outer", _parameters({"weight": (said, depths.inner), "bias": (said,)}, like))
        blocks[0].add_module("depth", head)
    running = Running(depths, blocks)
    for index, block in enumerate(blocks):
        block.__dict__["adapt"] = (running, index)
        block.__class__ = adaptive_class(type(block))  # type: ignore[arg-type]
    return running


def _parameters(shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> nn.Module:
    found = nn.Module()
    for name, shape in shapes.items():
        found.register_parameter(name, nn.Parameter(like.new_zeros(shape), requires_grad=False))
    return found


@cache
def adaptive_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A block's class whose forward asks the rule first."""
    names = list(inspect.signature(cls.forward).parameters)[2:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        kwargs |= dict(zip(names, rest, strict=False))
        running, index = self.adapt

        def run(state: Tensor, given: Mapping[str, Any]) -> Tensor:
            out = cls.forward(self, state, **given)
            running.values = len(out) if isinstance(out, tuple) else 0
            return out[0] if isinstance(out, tuple) else out

        rule = among_texts if running.depths.of_texts else among_tokens
        out = rule(running, index, run, hidden, kwargs)
        return (out, *[None] * (running.values - 1)) if running.values else out

    return type(f"Adaptive{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})


Run = Callable[[Tensor, Mapping[str, Any]], Tensor]

# ---------------------------------------------------------------- tokens


def among_tokens(running: Running, index: int, run: Run, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """One block for the tokens that its router lets in."""
    if index == 0:
        running.routed, running.ran = {}, torch.zeros(len(running.blocks), dtype=torch.long)
    if index not in running.depths.blocks:
        running.ran[index] = hidden.shape[0] * hidden.shape[1]
        return run(hidden, given)
    router: Any = running.blocks[index].depth
    scores = routed_scores(hidden, router.weight, router.bias)  # [n, T]
    if running.share is None:
        chosen = scores.sigmoid() > running.depths.threshold
    else:
        chosen = best(scores.detach(), running.share, running.protected)
        running.routed[index] = scores, chosen
    running.ran[index] = int(chosen.sum())
    past = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if past is not None:
        return _cached(running, index, run, hidden, given, past, scores, chosen)
    counts = chosen.sum(1)
    if bool((counts == counts[0]).all()):
        groups = [torch.arange(len(hidden))] if int(counts[0]) else []
    else:
        groups = [row[None] for row in counts.nonzero()[:, 0]]
    out = hidden
    for rows in groups:
        at = chosen[rows].nonzero()[:, 1].view(len(rows), -1)  # [rows, k]
        state = hidden[rows[:, None], at]
        new = run(state, {name: _at(name, v, rows, at, at) for name, v in given.items()})
        gate = scores[rows[:, None], at].sigmoid().to(state.dtype)[..., None]
        out = out.index_put((rows[:, None], at), torch.lerp(state, new, gate))
    return out


def routed_scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return over_rms(hidden.float()) @ weight.float() + bias.float()


def over_rms(state: Tensor) -> Tensor:
    return state * state.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def best(scores: Tensor, share: float, protected: int) -> Tensor:
    """The last ``protected`` tokens of each sequence, and a share of the others, the highest scores first [n, T]."""
    length = scores.shape[1]
    protected = min(protected, length)
    count = protected + round(share * (length - protected))
    ranked = scores.clone()
    ranked[:, length - protected :] = torch.inf
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, ranked.topk(count, dim=1).indices, True) if count else chosen


def _at(name: str, value: Any, rows: Tensor, at: Tensor, keys: Tensor) -> Any:
    """An argument of the block for the tokens ``at`` [rows, k] of ``rows``, which see ``keys`` [rows, s]."""
    if isinstance(value, tuple) and name == "position_embeddings":
        return tuple(_of_tokens(v, rows, at) for v in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask" and value.dim() == 4:
        own = value.expand(max(len(value), int(rows.max()) + 1), *value.shape[1:])[rows]  # [rows, 1 or H, T or 1, S]
        if own.shape[2] > 1:
            own = own.gather(2, at[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3]))
        return own.gather(3, keys[:, None, None, :].expand(-1, own.shape[1], own.shape[2], -1))
    if name in ("position_ids", "attention_mask"):
        return _of_tokens(value, rows, at)
    return value[at[0]] if name == "cache_position" else value


def _of_tokens(value: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    own = value.expand(max(len(value), int(rows.max()) + 1), *value.shape[1:])[rows]
    return own[torch.arange(len(rows))[:, None], at]


def _cached(
    running: Running, index: int, run: Run, hidden: Tensor, given: dict[str, Any], past: Any, scores: Tensor,
    chosen: Tensor,
) -> Tensor:  # fmt: skip
    """The same with a KV cache, which holds keys and values of the tokens that were let in."""
    if len(hidden) > 1:
        raise InputError("a network whose tokens pass blocks by generates one text at a time, or with use_cache=False")
    seen = int(past.get_seq_length(0)) - hidden.shape[1]  # the first block has written already
    kept: dict[int, Tensor] = past.__dict__.setdefault(KEPT, {})
    before = kept.get(index, torch.empty(0, dtype=torch.long)) if seen else torch.empty(0, dtype=torch.long)
    if len(before) != int(past.get_seq_length(index)):
        raise InputError("the KV cache of a network whose tokens pass blocks by cannot be cut; use_cache=False can")
    at = chosen[0].nonzero()[:, 0]
    if not len(at):
        return hidden
    keys = torch.cat([before, seen + at])
    rows = torch.zeros(1, dtype=torch.long)
    own = {name: _at(name, v, rows, at[None], keys[None]) for name, v in given.items()}
    if own.get("attention_mask") is None and len(before) and len(at) > 1:
        own["attention_mask"] = (keys[None, :] <= (seen + at)[:, None])[None, None]
    state = hidden[:, at]
    new = run(state, own)
    kept[index] = keys
    gate = scores[:, at].sigmoid().to(state.dtype)[..., None]
    return hidden.index_put((rows[:, None], at[None]), torch.lerp(state, new, gate))


# ---------------------------------------------------------------- texts


def among_texts(running: Running, index: int, run: Run, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """One block for the texts that have not left."""
    if any(given.get(name) is not None for name in CACHES):
        raise InputError("a network whose texts leave early keeps no KV cache; call it with use_cache=False")
    texts = len(hidden)
    if index == 0:
        running.alive = torch.ones(texts, dtype=torch.bool)
        running.ran = torch.zeros(texts, dtype=torch.long)
        running.sums, running.before = torch.zeros(texts), torch.zeros(texts, hidden.shape[-1])
    rows = running.alive.nonzero()[:, 0]
    if not len(rows):
        return hidden
    own = given if len(rows) == texts else {name: _of_texts(v, rows, texts) for name, v in given.items()}
    new = run(hidden[rows] if own is not given else hidden, own)
    out = new if own is given else hidden.index_put((rows,), new)
    running.ran[rows] += 1
    if index + 1 < len(running.blocks):
        leave(running, index, rows, new, own.get("attention_mask"))
    return out


def leave(running: Running, index: int, rows: Tensor, state: Tensor, mask: Tensor | None) -> None:
    """Decide which of the texts ``rows`` have seen enough blocks."""
    if running.fixed is not None:
        running.alive[rows] = running.fixed[rows] > index + 1
        return
    head: Any = running.blocks[0].depth
    now = over_rms(pooled(state.float(), mask)).cpu()
    if running.depths.rule == "gate":
        if index == 0:
            running.sums[rows] = 1.0 + said(head, now).argmax(-1).float()
        running.alive[rows] = running.sums[rows] > index + 1
        return
    chance = exit_chance(head, now, running.before[rows], index)
    running.sums[rows] += chance * (1 - running.sums[rows])
    running.before[rows] = now
    running.alive[rows] = running.sums[rows] < running.depths.threshold


def exit_chance(head: Any, now: Tensor, before: Tensor, index: int) -> Tensor:
    """lambda of every text [n] from its state behind a block, and behind the one before it, over their rms."""
    code = [now + depth_code(index + 1, now.shape[-1]), before + depth_code(index, now.shape[-1]) * (index > 0)]
    return said(head, torch.cat(code, -1))[:, 0].sigmoid()


def said(head: Any, read: Tensor) -> Tensor:
    """What a head gives [n, o]."""
    values = (p.float().to(read.device) for m in (head.inner, head.outer) for p in (m.weight, m.bias))
    inner, bias, outer, shift = values
    return torch.tanh(read @ inner.T + bias) @ outer.T + shift


def depth_code(depth: int, width: int) -> Tensor:
    """A hundredth of the sinusoidal code of a depth [width]."""
    rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return 0.01 * torch.stack([(depth * rate).sin(), (depth * rate).cos()], -1).flatten()[:width]


def pooled(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean state of each text's tokens [n, d]; ``mask`` as blocks are given it."""
    if mask is None:
        return state.mean(1)
    seen = mask if mask.dim() == 2 else mask[:, 0, -1]
    counted = (seen if seen.dtype == torch.bool else seen > 0.5 if mask.dim() == 2 else seen > -1).to(state.dtype)
    return (state * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def _of_texts(value: Any, rows: Tensor, texts: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_of_texts(v, rows, texts) for v in value)
    return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == texts else value


# ---------------------------------------------------------------- networks


def adapted(network: Network, depths: Depths, values: Mapping[str, Tensor]) -> Network:
    """The network that runs so; ``values``: parameters that it does not read from the checkpoint, by name.

    It is measured and saved like an arranged one, and like that cannot be calibrated or compressed.
    """
    from layerwise.network.artifact_config import sites_config
    from layerwise.network.sites import find_sites
    from layerwise.network.skeleton import build_on_meta

    if network.whole or network.arrangement is not None or network.depths is not None:
        raise InputError(f"{network.name} runs in a way of its own already; start from the checkpoint it was made from")
    config = {**network.checkpoint.config, "quantization_config": sites_config({}, depths=depths)}
    module = build_on_meta(network.architecture, config)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    missing = [name for name in names if name not in network.stored.of and name not in values]
    if missing:
        raise InputError(f"{network.name} run by depths needs values for {missing[0]}")
    return dataclasses.replace(
        network,
        checkpoint=dataclasses.replace(network.checkpoint, config=config),
        module=module,
        tree=find_sites(module),
        stored=network.stored.renamed({name: name for name in names if name in network.stored.of}),
        given={**network.given, **values},
    )
