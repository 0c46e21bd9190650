"""``layerwise evaluate OUT --dense MODEL --evaluate TEXT``: measure a saved artifact again."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.calibrate.text import Text
    from layerwise.evaluate.artifact import ArtifactQuality


def evaluate(
    artifact: Annotated[str, typer.Argument(help="A folder written by layerwise compress.", metavar="OUT")],
    dense: Annotated[str, typer.Option(metavar="MODEL", help="The dense network it was made from.")],
    evaluate: Annotated[
        str, typer.Option("--evaluate", metavar="TEXT", help="Held-out text, or scored sentence pairs.")
    ],
    sequences: Annotated[int, typer.Option(help="Sequences read from the text.")] = 256,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    activations: shared.Activations = None,
    kv_cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--kv-cache", metavar="KIND", help="Also keep keys and values in int8 or int4, and measure that."),
    ] = None,
    seed: shared.Seed = 0,
    json: shared.Json = False,
) -> None:
    """Measure OUT against the dense network: quality, size, latency, peak memory."""
    from layerwise.acts.activations import grids_of_artifact
    from layerwise.acts.prepare import longest, open_tokenizer
    from layerwise.calibrate.text import read_text
    from layerwise.evaluate.artifact import evaluate_artifact
    from layerwise.jobs.cache_quality import check_cache
    from layerwise.network.artifact import open_artifact
    from layerwise.network.network import open_network, reads_images

    network = open_network(dense)
    if kv_cache is not None:
        check_cache(network, kv_cache)
    if reads_images(network):
        from layerwise.library import evaluate as measure

        found = measure(artifact, dense=network, text=evaluate, activations=activations)
        show(found, f"images of {evaluate}", json)
        return
    inputs = grids_of_artifact(open_artifact(artifact), network, activations)
    text = read_text(evaluate, text_column)
    tokenizer = open_tokenizer(network)
    with shared.Bar(quiet=json).stage("evaluate", (3 if inputs else 2) * len(network.tree.blocks)) as advance:
        found = evaluate_artifact(
            artifact, dense, text, tokenizer, pooling, sequences, min(length, longest(network)), seed, advance,
            inputs,
        )  # fmt: skip
    if kv_cache is not None:
        found = _with_cache(found, artifact, dense, kv_cache, text, sequences, min(length, longest(network)), json)
    show(found, f"{found.tokens:,} tokens of {text.source}", json)


def _with_cache(
    found: ArtifactQuality, artifact: str, dense: str, kind: str, text: Text, sequences: int, length: int, json: bool
) -> ArtifactQuality:
    from layerwise.jobs.cache_quality import evaluate_cache

    with shared.Bar(quiet=json).stage(f"evaluate an {kind} cache", -(-sequences // 4)) as advance:
        cache = evaluate_cache(artifact, dense, kind, text, sequences, length, advance)
    sizes = {"bytes a token": cache.bytes_a_token, "dense bytes a token": cache.plain_bytes_a_token}
    return replace(found, cache={"kind": kind, **cache.metrics, **sizes})


def show(found: ArtifactQuality, title: str, json: bool) -> None:
    from layerwise.engine.machine import peak_memory
    from layerwise.report.figures import megabytes, significant

    if json:
        shared.print_json({**asdict(found), "peak_memory": peak_memory()})
        return
    tried = {"quantized activations": found.activations} if found.activations else {}
    if found.cache:
        tried[f"{found.cache['kind']} cache"] = found.cache
    columns = [found.dense, found.artifact, *tried.values()]
    size = megabytes(found.bytes)
    rows = [("size", megabytes(found.dense_bytes), *[size] * (len(columns) - 1))]
    rows += [(name, *(significant(c.get(name), 4) for c in columns)) for name in found.artifact]
    rows.append(("latency, one sequence", "", f"{found.latency_ms:.1f} ms", *[""] * (len(columns) - 2)))
    if found.library_blocks[1]:
        said = "{} of {}".format(*found.library_blocks)
        rows.append(("  blocks by the compiled library", "", said, *[""] * (len(columns) - 2)))
    rows.append(("peak memory of this run", "", megabytes(peak_memory()), *[""] * (len(columns) - 2)))
    if found.cache:
        cached = (f"{found.cache['dense bytes a token']:,.0f} bytes", f"{found.cache['bytes a token']:,.0f} bytes")
        rows.append(("cache of a token, float32", cached[0], *[""] * (len(columns) - 2), cached[1]))
    names = ("", "dense", "artifact", *tried)
    shared.print_table(title, names, rows, numeric=range(1, len(names)))
