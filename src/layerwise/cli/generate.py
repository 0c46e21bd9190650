"""``layerwise generate OUT --prompt TEXT``: continue a text with a packed artifact or a dense checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.generate.wanted import Generation
    from layerwise.jobs.generating import Asked, Speaker


def generate(
    network: Annotated[
        str, typer.Argument(help="A folder written by layerwise compress, or a checkpoint.", metavar="OUT_OR_MODEL")
    ],
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--prompt", metavar="TEXT", help="What to continue; may be repeated."),
    ] = None,
    prompts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompts", metavar="FILE", help="A text file with a prompt a line."),
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="TEXT", help="Stands before every prompt; adacad contrasts with it and without.")
    ] = "",
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="New tokens of a prompt at most; 128, or what the network has positions for."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that make up this share.")] = 1.0,
    seed: shared.Seed = 0,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How: plain, self_speculative, early_exit, eagle, adacad, …; options follow a colon."
        ),
    ] = "plain",
    kv_cache: Annotated[str, typer.Option(help="How keys and values are kept: 16 (as computed), int8 or int4.")] = "16",
    ignore_stop: Annotated[bool, typer.Option("--ignore-stop", help="Go on behind the end of a text.")] = False,
    dtype: Annotated[str, typer.Option(help="Type to compute in: auto, float32, bfloat16 or float16.")] = "auto",
    threads: shared.Threads = None,
    device: shared.Device = "cpu",
    json: shared.Json = False,
) -> None:
    """Continue PROMPT; greedily unless a temperature is given."""
    from layerwise.errors import InputError
    from layerwise.jobs.generating import Asked, open_speaker, read_prompts
    from layerwise.jobs.generating import generate as run

    asked = Asked(max_new_tokens, temperature, top_k, top_p, seed, method, kv_cache, ignore_stop)
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    if not texts:
        raise InputError("give --prompt TEXT, or --prompts FILE with a prompt a line")
    speaker = open_speaker(network, dtype, device, threads, asked.generator.streams)
    streams = len(texts) == 1 and not json
    if streams:
        print(texts[0], end="", flush=True)
    found = run(speaker, texts, asked, _show if streams else None, context)
    if json:
        shared.print_json(as_json(speaker, texts, asked, found))
        return
    if streams:
        print()
    else:
        for text, tokens in zip(texts, found.tokens, strict=True):
            print(f"{text}{speaker.text(tokens)}\n")
    print(summary(found), file=sys.stderr)


def _show(_: int, text: str) -> None:
    print(text, end="", flush=True)


def as_json(speaker: Speaker, texts: list[str], asked: Asked, found: Generation) -> dict[str, Any]:
    """One prompt's tokens and text lie at the top; several prompts are a list under ``outputs``."""
    from dataclasses import asdict

    outputs = [
        {"prompt": text, "tokens": list(tokens), "text": speaker.text(tokens)}
        for text, tokens in zip(texts, found.tokens, strict=True)
    ]
    body = outputs[0] if len(outputs) == 1 else {"outputs": outputs}
    return {
        **body, "method": str(asked.generator), "tokens_per_second": found.tokens_per_second,
        "kv_cache": asked.cache, **asdict(found.work), **found.notes,
    }  # fmt: skip


def summary(found: Generation) -> str:
    """What it took, in one line."""
    work, count = found.work, sum(map(len, found.tokens))
    said = f"{count} tokens, {found.tokens_per_second:.1f} tokens/s"
    said += f" (prompt {work.prefill_seconds:.2f} s, then {work.full_passes} full passes)"
    if work.drafted:
        said += f", {work.accepted} of {work.drafted} drafted tokens accepted"
    if work.exited:
        said += f", {work.exited} tokens left early"
    return said
