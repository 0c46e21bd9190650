"""``layerwise train BLUEPRINT OUT``: build and train a network from scratch."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def train(
    blueprint: Annotated[
        str, typer.Argument(help="What to train, such as trilm or osp; options follow a colon.", metavar="BLUEPRINT")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write: a plain checkpoint and its log.", metavar="OUT")],
    text: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="Text to train on: .txt, .jsonl, .csv or a data set id.")
    ],
    evaluate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--evaluate", metavar="TEXT", help="Held-out text; without it every tenth document of TEXT."),
    ] = None,
    packed: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Also write the packed artifact, for networks trained in a stored form."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 400,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    width: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    inner: Annotated[Optional[int], typer.Option(help="Width of the feed-forward; 2.75 widths by default.")] = None,  # noqa: UP045
    blocks: Annotated[int, typer.Option(help="Blocks.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Words of the tokenizer, which is made from TEXT.")] = 512,
    context: Annotated[int, typer.Option(help="Longest sequence that the network takes.")] = 256,
    seed: shared.Seed = 0,
    threads: Annotated[int, typer.Option(help="Threads; the same number gives the same network.")] = 1,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Train a network from scratch on TEXT and write it as a checkpoint that every other verb opens."""
    from dataclasses import asdict

    from layerwise.blueprints.decoder import Size
    from layerwise.jobs.training import Pace, Training
    from layerwise.jobs.training import train as run

    size = Size(vocabulary, width, inner if inner is not None else 11 * width // 4, blocks, heads, context)
    found = run(
        Training(blueprint, out, text, evaluate, packed, size, Pace(steps, batch, length, seed), force, threads),
        shared.Bar(quiet=json),
    )
    if json:
        shared.print_json(asdict(found))
        return
    print(f"{found.blueprint}: {found.parameters:,} parameters, {found.seen_tokens:,} tokens seen")
    print(f"held-out loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.3f}")
    print(f"wrote {found.out} ({found.bytes:,} bytes of weights)")
    if found.packed is not None:
        print(f"wrote {found.packed} ({found.packed_bytes:,} bytes of weights)")
