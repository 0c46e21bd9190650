"""The act *generate*: open a network or an artifact, read prompts, continue them.

A packed artifact multiplies from its stored form; a dense checkpoint is loaded as it is. Half precision is computed in
float32 on a CPU, which has no fast fp16 product, unless a type is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import InputError
from layerwise.generate.choice import Choice
from layerwise.generate.network import CausalNetwork, by_columns, causal_network
from layerwise.generate.streamed import open_streamed
from layerwise.generate.wanted import Generation, Wanted, check_prompts, silent
from layerwise.network.artifact import open_artifact
from layerwise.network.load import load
from layerwise.recipe import parse_generator
from layerwise.roles import Generator

USUAL_TOKENS = 128
LONGEST_LETTER = 4  # tokens, where each is a byte
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Speaker:
    """A network that generates, and its tokenizer."""

    network: CausalNetwork
    tokenizer: Any

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt; a text without any begins where the network's texts begin."""
        found: list[int] = self.tokenizer(prompt)["input_ids"]
        start = self.tokenizer.bos_token_id
        return found or ([] if start is None else [start])

    def text(self, tokens: Sequence[int]) -> str:
        found: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return found


def open_speaker(
    source: str, dtype: str = "auto", device: str = "cpu", threads: int | None = None, streamed: bool = False
) -> Speaker:
    """Open a checkpoint, an artifact or a hub id. Raises ``InputError`` for what generates no text.

    streamed: leave the blocks of a dense checkpoint on disk, from where they are read as they run.
    """
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    artifact = open_artifact(source)
    check_generates(artifact.checkpoint.architecture)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
    if streamed:
        if artifact.sites or device != "cpu":
            raise InputError("blocks are streamed from dense checkpoints to the CPU; layerwise export makes one of OUT")
        network, _ = open_streamed(source, DTYPES.get(dtype))
        return Speaker(network, tokenizer_of(artifact.directory))
    with _quiet():
        module = load(source, DTYPES.get(dtype), device)
        if dtype == "auto" and device == "cpu" and _computes_in(module) == torch.float16:
            module = load(source, torch.float32, device)  # what holds packed sites cannot be cast afterwards
    by_columns(module)
    return Speaker(causal_network(module), tokenizer_of(artifact.directory))


def check_generates(architecture: str) -> None:
    """``InputError`` for encoders and classifiers."""
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"a {architecture} generates no text; give a causal language model, such as a LlamaForCausalLM"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar, which would stand between prompt and text."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _computes_in(module: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)


def tokenizer_of(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception:  # transformers raises many kinds for a missing or broken tokenizer
        raise InputError(
            f"{folder} has no tokenizer that transformers can read; put tokenizer.json beside config.json"
        ) from None


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; checked before the network is opened."""

    new_tokens: int | None = None  # as many as usual, or as there is room for
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    method: str = "plain"
    cache: str = "16"
    ignore_stop: bool = False
    generator: Generator = field(init=False)
    wanted: Wanted = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", parse_generator(self.method))
        choice = Choice(self.temperature, self.top_k, self.top_p, self.seed)
        new_tokens = USUAL_TOKENS if self.new_tokens is None else self.new_tokens
        object.__setattr__(self, "wanted", Wanted(new_tokens, choice, self.cache, self.ignore_stop))

    def fitting(self, room: int) -> Wanted:
        """What is wanted where there are so many positions behind the longest prompt."""
        if self.new_tokens is not None or room >= self.wanted.new_tokens or room < 1:
            return self.wanted
        return replace(self.wanted, new_tokens=room)


def generate(
    speaker: Speaker,
    prompts: Sequence[str],
    asked: Asked,
    show: Callable[[int, str], None] | None = None,
    context: str = "",
) -> Generation:
    """Continue prompts; ``show`` is told of new text of each as soon as it is certain.

    context: stands before every prompt, joined by a newline; methods that contrast also read the prompt without it.
    """
    tokens = [speaker.tokens(f"{context}\n{prompt}" if context else prompt) for prompt in prompts]
    bare = tuple(tuple(speaker.tokens(prompt)) for prompt in prompts) if context else ()
    check_prompts(speaker.network, tokens)
    check_prompts(speaker.network, bare or tokens)
    pieces = [Pieces(speaker) for _ in prompts]

    def emit(row: int, new: Sequence[int]) -> None:
        if show is not None and (said := pieces[row].add(new)):
            show(row, said)

    wanted = replace(asked.fitting(speaker.network.longest - max(map(len, tokens))), bare=bare)
    found = asked.generator.generate(speaker.network, tokens, wanted, emit if show else silent)
    for row, piece in enumerate(pieces):
        if show is not None and (said := piece.add((), last=True)):
            show(row, said)
    return found


@dataclass(frozen=True)
class Continued:
    """A prompt and what came of it; the prompt is in neither ``tokens`` nor ``text``."""

    prompt: str
    tokens: tuple[int, ...]
    text: str


def continued(source: str | Path | Speaker, prompts: str | Sequence[str], **options: Any) -> list[Continued]:
    """``layerwise.generate("OUT", "Once upon")``: every prompt continued.

    source:  a checkpoint, an artifact, or what ``open_speaker`` returned, to open it once for many calls.
    options: those of ``Asked``: ``new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``seed``, ``method``, ``cache``.
    """
    asked = Asked(**options)
    speaker = source if isinstance(source, Speaker) else open_speaker(str(source))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found = generate(speaker, texts, asked)
    return [Continued(p, t, speaker.text(t)) for p, t in zip(texts, found.tokens, strict=True)]


class Pieces:
    """New text of a growing list of tokens. A letter may take several tokens, and a word's look hangs on the last."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.tokens: list[int] = []
        self.begin = self.shown = 0  # text is decoded from one place on, and was shown up to another

    def add(self, new: Sequence[int], last: bool = False) -> str:
        """What can be shown now; ``last`` shows the rest, be it letters or not."""
        self.tokens += new
        before = self.speaker.text(self.tokens[self.begin : self.shown])
        now = self.speaker.text(self.tokens[self.begin :])
        unfinished = now.endswith("\ufffd") and len(self.tokens) - self.shown < LONGEST_LETTER
        if (unfinished and not last) or len(now) <= len(before):
            return ""
        self.begin, self.shown = self.shown, len(self.tokens)
        return now[len(before) :]


def read_prompts(file: str) -> list[str]:
    """Prompts of a text file, one a line; empty lines are left out."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(
            f"there is no readable file {file}; --prompts names a text file with a prompt a line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; --prompts names a text file with a prompt a line") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"{file} has no prompts; write one a line")
    return found
