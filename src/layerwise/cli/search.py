"""``layerwise search METHOD OUT``: find an architecture for labelled images, and train it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def search(
    method: Annotated[
        str, typer.Argument(help="How to search, such as random_search or tangle_nas; options follow a colon.")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write: the network found and its config.", metavar="OUT")],
    images: Annotated[
        str, typer.Option("--images", metavar="FILE", help="Labelled images, .npz or .safetensors, floats or bytes.")
    ],
    labels: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--labels", metavar="FILE", help="File with the labels, where FILE of images has none."),
    ] = None,
    evaluate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--evaluate", metavar="FILE", help="Held-out labelled images; validation images without it."),
    ] = None,
    widths: Annotated[str, typer.Option(metavar="A,B", help="Widths of the space, multiples of 16.")] = "16,32,48",
    depths: Annotated[str, typer.Option(metavar="A,B", help="Numbers of blocks of the space.")] = "2,3,4",
    ratios: Annotated[str, typer.Option(metavar="A,B", help="Feed-forward ratios of a block.")] = "1,2,3,4",
    patch: Annotated[Optional[int], typer.Option(help="Side of a patch; about a fourth of the image's.")] = None,  # noqa: UP045
    limit: Annotated[float, typer.Option(help="Most parameters, as a share of the largest architecture's.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Budget of search and training, in steps of the largest that fits.")] = 300,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 5e-3,
    seed: shared.Seed = 0,
    threads: Annotated[int, typer.Option(help="Threads; the same number gives the same network.")] = 1,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Search an architecture for labelled images within a budget, train it, and write it to OUT."""
    from dataclasses import asdict

    from layerwise.jobs.searching import Searching
    from layerwise.jobs.searching import search as run

    choices = {
        name: shared.whole_numbers(name, text)
        for name, text in (("widths", widths), ("depths", depths), ("ratios", ratios))
    }
    asked = Searching(
        method, out, images, labels, evaluate, **choices, patch=patch, limit=limit,
        steps=steps, batch=batch, rate=rate, seed=seed, force=force, threads=threads,
    )  # fmt: skip
    found = run(asked, shared.Bar(quiet=json))
    if json:
        shared.print_json(asdict(found))
        return
    print(f"{found.method} found {found.architecture}: {found.parameters:,} parameters, {found.macs:,} multiply-adds")
    print(f"{found.judged_on}: loss {found.loss:.4f} nats, top-1 {found.accuracy:.4f}")
    print(f"{found.searched:.0%} of the budget went into the search, {found.total - found.searched:.0%} into training")
    print(f"wrote {found.out} ({found.bytes:,} bytes of weights)")
