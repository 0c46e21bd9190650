"""The act *train*: build a blueprint, train it on text, and write a checkpoint that every other act opens.

    text ─► tokenizer (byte-level BPE of its own) ─► one run of tokens ─► windows drawn by the seed
         ─► the blueprint's optimisers, paced by the share of the run that is done ─► finish ─► checkpoint

One generator: equal text, options, threads and versions give equal files. Windows depend on the seed alone, so
variants of a blueprint see the same batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.blueprints.decoder import Size
from layerwise.blueprints.finished import Finished, save_packed, save_plain
from layerwise.calibrate.text import Text, read_text, refuse_overlap
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.network.artifact import check_free, staged
from layerwise.recipe import parse_blueprint
from layerwise.roles import Blueprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_ONE_IN = 10  # documents, where no held-out text is given
SPECIAL = ("<s>", "</s>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL)  # every byte has a word
LARGEST_GRADIENT = 1.0  # norm over all parameters
WINDOWS_AT_A_TIME = 16  # when the held-out loss is taken
LOSSES_KEPT = 40  # points of the log


@dataclass(frozen=True)
class Pace:
    """How long and on what a network is trained: ``steps`` steps of ``batch`` windows of ``length`` tokens."""

    steps: int = 400
    batch: int = 8
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenizer and what it makes of the training and the held-out text: int64 [tokens] each."""

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True, eq=False)
class Trained:
    """The blueprint's own module after training, its losses by step, and what ships."""

    module: nn.Module
    losses: tuple[float, ...]
    finished: Finished


@dataclass(frozen=True)
class Training:
    """What ``layerwise train`` is asked for."""

    blueprint: str
    out: str
    text: str
    evaluate: str | None = None
    packed: str | None = None
    size: Size = field(default_factory=Size)
    pace: Pace = field(default_factory=Pace)
    force: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InputError(f"--threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class Report:
    """What was written. Losses are in nats per token of held-out text; ``bytes`` are those of the weights file."""

    blueprint: str
    out: str
    parameters: int
    train_tokens: int
    seen_tokens: int
    loss: float
    perplexity: float
    bytes: int
    packed: str | None
    packed_bytes: int | None
    losses: tuple[float, ...]
    size: dict[str, int]
    pace: dict[str, int]
    versions: dict[str, str]


# ---------------------------------------------------------------- the act


def train(asked: Training, progress: Progress | None = None) -> Report:
    """Train and write ``out`` (a plain fp16 checkpoint, tokenizer and log), and ``packed`` where it is asked for.

    Raises ``InputError`` before any training for an unknown blueprint or option, a size that cannot be built, text
    that is missing or too short, a place that is taken, and ``packed`` for a blueprint that has no stored form.
    """
    watch = Stopwatch(progress)
    blueprint = parse_blueprint(asked.blueprint)
    for place in filter(None, (asked.out, asked.packed)):
        check_free(Path(place), asked.force)
    if asked.packed is not None and Path(asked.packed).absolute() == Path(asked.out).absolute():
        raise InputError("--packed and OUT must be different folders")
    if asked.pace.length > asked.size.context:
        raise InputError(f"--length {asked.pace.length} is more than the context of {asked.size.context} tokens")
    if asked.packed is not None and not blueprint.finish(blueprint.build(replace(asked.size, blocks=1), 0)).encoded:
        raise InputError(f"{blueprint} trains dense weights, so it has no packed form; leave --packed out")
    corpus = read_corpus(asked.text, asked.evaluate, asked.size.vocabulary, asked.pace.length)
    torch.set_num_threads(asked.threads)
    size = replace(asked.size, vocabulary=len(corpus.tokenizer))
    trained = fit(blueprint, size, corpus.train, asked.pace, watch)
    network = trained.finished.network
    loss = held_out_loss(network, corpus.held_out, asked.pace.length)
    with staged(Path(asked.out), asked.force) as folder:
        written = save_plain(trained.finished, corpus.tokenizer, folder)
        packed_bytes = None
        if asked.packed is not None:
            with staged(Path(asked.packed), asked.force) as beside:
                packed_bytes = save_packed(trained.finished, folder, beside)
        every = max(1, asked.pace.steps // LOSSES_KEPT)
        report = Report(
            blueprint=str(blueprint), out=asked.out, parameters=blueprint.parameters(size),
            train_tokens=len(corpus.train), seen_tokens=asked.pace.steps * asked.pace.batch * asked.pace.length,
            loss=loss, perplexity=math.exp(loss), bytes=written,
            packed=asked.packed, packed_bytes=packed_bytes, losses=trained.losses[every - 1 :: every],
            size=asdict(size), pace=asdict(asked.pace), versions=versions(),
        )  # fmt: skip
        (folder / "training.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def fit(blueprint: Blueprint, size: Size, tokens: Tensor, pace: Pace, watch: Stopwatch) -> Trained:
    """Train the blueprint on a run of tokens int64 [tokens]. Raises ``InputError`` if the loss stops being a number."""
    module = blueprint.build(size, pace.seed).train()
    optimisers = blueprint.optimisers(module)
    peaks = [(g, g["lr"], g["weight_decay"]) for o in optimisers for g in o.param_groups]
    parameters = list(module.parameters())
    draw = torch.Generator().manual_seed(pace.seed)
    losses = []
    with watch.stage(f"train {blueprint}, width {size.width}", pace.steps) as advance:
        for step in range(pace.steps):
            rate, decay = blueprint.pace((step + 1) / pace.steps)
            for group, peak, decays in peaks:
                group["lr"], group["weight_decay"] = peak * rate, decays * decay
            starts = torch.randint(0, len(tokens) - pace.length, (pace.batch,), generator=draw)
            windows = torch.stack([tokens[s : s + pace.length + 1] for s in starts.tolist()])
            loss = loss_of(module, windows)
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            for optimiser in optimisers:
                optimiser.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"training of {blueprint} came apart at step {step + 1}; give it a smaller rate")
            advance()
    module.eval()
    return Trained(module, tuple(losses), blueprint.finish(module))


def loss_of(module: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each window's next tokens; ``windows`` int64 [n, length + 1]."""
    logits = module(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def held_out_loss(module: nn.Module, tokens: Tensor, length: int, windows: int = 10**9) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of the tokens, at most so many."""
    every = windows_of(tokens, length)[:windows]
    total = sum(
        float(loss_of(module, every[i : i + WINDOWS_AT_A_TIME], "sum")) for i in range(0, len(every), WINDOWS_AT_A_TIME)
    )
    return total / (len(every) * length)


def windows_of(tokens: Tensor, length: int) -> Tensor:
    """Consecutive windows int64 [n, length + 1], each beginning with the last token of the one before."""
    return tokens.unfold(0, length + 1, length)


# ---------------------------------------------------------------- text


def read_corpus(text: str, evaluate: str | None, vocabulary: int, length: int) -> Corpus:
    """Read and tokenise; without ``evaluate`` every tenth document is held out.

    The tokenizer is trained on the training text alone. Raises ``InputError`` for text that is too short, or that the
    two share.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise InputError(f"--vocabulary must be at least {SMALLEST_VOCABULARY}, not {vocabulary}")
    source = read_text(text)
    if evaluate is None:
        documents = source.documents
        held = Text(source.source, documents[HELD_OUT_ONE_IN - 1 :: HELD_OUT_ONE_IN])
        source = Text(
            source.source, tuple(d for i, d in enumerate(documents) if (i + 1) % HELD_OUT_ONE_IN or len(documents) == 1)
        )
    else:
        held = read_text(evaluate)
        refuse_overlap(source, held)
    return make_corpus(source, held, vocabulary, length)


def make_corpus(text: Text, held_out: Text, vocabulary: int, length: int) -> Corpus:
    """Tokenise both texts with a tokenizer of the first."""
    tokenizer = make_tokenizer(list(text.lines), vocabulary)
    ids = [_ids(tokenizer, found.lines) for found in (text, held_out)]
    for tokens, which, found in zip(ids, ("training", "held-out"), (text, held_out), strict=True):
        if len(tokens) <= length + 1:
            raise InputError(
                f"{found.source} gives {len(tokens)} tokens of {which} text, and a window takes {length + 1}; "
                f"give more text or a smaller --length"
            )
    return Corpus(tokenizer, ids[0], ids[1])


def make_tokenizer(lines: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the lines, with at most ``vocabulary`` words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _ids(tokenizer: Any, lines: Any) -> Tensor:
    """All lines as one run of tokens, newlines between them."""
    return torch.tensor(tokenizer.backend_tokenizer.encode("\n".join(lines)).ids, dtype=torch.int64)
