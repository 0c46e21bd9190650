"""``layerwise probe MODEL PROBE``: look at a network and change nothing."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def probe(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A Hugging Face checkpoint directory or hub id.", metavar="MODEL"),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="What to measure, such as spectrum_alpha; options follow a colon.", metavar="PROBE"),
    ] = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--out", metavar="FILE.html", help="Write a page with the pictures; it loads nothing."),
    ] = None,
    calibrate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--calibrate", metavar="TEXT", help="Text to run, for probes that read hidden states."),
    ] = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    device: shared.Device = "cpu",
    list_probes: Annotated[bool, typer.Option("--list", help="List the probes, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.html if it exists.")] = False,
    json: shared.Json = False,
) -> None:
    """Measure something about MODEL without changing it: PROBE per site or block, with pictures."""
    from layerwise.errors import InputError

    if list_probes:
        _list(json)
        return
    if model is None or name is None:
        raise InputError("give MODEL and PROBE, such as layerwise probe MODEL spectrum_alpha; --list shows all probes")
    from layerwise.recipe import parse_probe
    from layerwise.technique import BLOCK_INPUTS

    chosen = parse_probe(name, seed)
    reads_text = BLOCK_INPUTS in chosen.needs
    if calibrate is not None and not reads_text:
        raise InputError(f"the probe {name} reads weights only; leave --calibrate out")
    from layerwise.report.probe_page import check_page

    page = check_page(out, force) if out is not None else None
    from layerwise.acts.prepare import Options
    from layerwise.calibrate.text import DEFAULT
    from layerwise.library import probe as measure
    from layerwise.network.network import open_network

    if reads_text:
        Options(
            model=model, sequences=sequences, length=length, threads=1 if threads is None else threads
        )  # refuses what is out of range
    network = open_network(model)
    found = measure(
        network, chosen, progress=shared.Bar(quiet=json), text=calibrate or DEFAULT, text_column=text_column,
        sequences=sequences, length=length, seed=seed, threads=threads, device=device,
    )  # fmt: skip
    shared.show_measurement(found, page, json)


def _list(json: bool) -> None:
    from layerwise.roles import Probe
    from layerwise.technique import BLOCK_INPUTS, find, names

    known = [find(n) for n in names(Probe)]
    rows = [
        {"probe": c.name, "paper": c.paper, "reads": "text" if BLOCK_INPUTS in c.needs else "weights",
         "does": (c.__doc__ or "").strip().partition("\n")[0]}
        for c in known
    ]  # fmt: skip
    if json:
        shared.print_json(rows)
        return
    shared.print_table("Probes", ("probe", "paper", "reads", ""), [tuple(r.values()) for r in rows])
