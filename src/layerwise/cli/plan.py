"""``layerwise plan MODEL --budget B --work DIR`` and ``layerwise plan diff A B``, ``layerwise plan show P``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.plan.file import PlanFile


class PlanGroup(TyperGroup):
    """``plan MODEL …`` is ``plan make MODEL …``: anything that is not a verb is a network."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["make", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=PlanGroup,
    no_args_is_help=True,
    help="Choose what every layer gets: plan MODEL --budget 4bpw --work DIR; plan show P; plan diff A B.",
)

PlanPath = Annotated[str, typer.Argument(help="A plan.json, or an artifact folder that holds one.")]


@app.command("make", help="Plan for MODEL (the word make may be left out).")
def make(
    model: shared.Model,
    budget: Annotated[str, typer.Option(help="4.5bpw, 12MB, 1234567B or 25%.")],
    work: Annotated[str, typer.Option(metavar="DIR", help="Work folder of calibrate or compress; filled if need be.")],
    out: Annotated[Optional[str], typer.Option(help="Write the plan to this file.")] = None,  # noqa: UP045
    techniques: shared.Techniques = None,
    calibrate: shared.Calibrate = "default",
    evaluate: shared.Evaluate = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    keep: shared.Keep = None,
    fix: shared.Fix = None,
    redo: shared.Redo = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    workers: shared.Workers = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "cpu",
    rewrite: shared.Rewrite = None,
    allocator: shared.Allocator = None,
    target: shared.Target = None,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Plan for MODEL, from a work folder in seconds."""
    from layerwise.acts.prepare import Options
    from layerwise.compress import plan_only
    from layerwise.errors import InputError
    from layerwise.plan.file import write_plan

    if out is not None and Path(out).exists() and not force:
        raise InputError(f"{out} exists; choose another name or give --force to replace it")
    cores = os.cpu_count() or 1
    options = Options(
        model=model, budget=budget, work=work, techniques=shared.split_techniques(techniques), calibrate=calibrate,
        evaluate=evaluate, sequences=sequences, length=length, text_column=text_column, pooling=pooling,
        keep=tuple(keep or ()), fix=tuple(fix or ()), redo=tuple(redo or ()), seed=seed,
        threads=cores if threads is None else threads, workers=cores if workers is None else workers, dtype=dtype,
        device=device, rewrite=rewrite, allocators=(allocator,) if allocator else (),
        target=target,
    )  # fmt: skip
    plan = plan_only(options, shared.Bar(quiet=json))
    if out is not None:
        write_plan(out, plan)
    show_plan(plan, json)


@app.command("show")
def show(path: PlanPath, json: shared.Json = False) -> None:
    """Print a plan: per site what was chosen, and its next better and next cheaper choice."""
    from layerwise.plan.file import read_plan

    show_plan(read_plan(plan_file(path)), json)


@app.command("diff")
def diff(a: PlanPath, b: PlanPath, json: shared.Json = False) -> None:
    """Print the sites at which two plans differ, B against A."""
    from dataclasses import asdict

    from layerwise.plan.difference import difference
    from layerwise.plan.file import read_plan

    found = difference(read_plan(plan_file(a)), read_plan(plan_file(b)))
    if json:
        shared.print_json(asdict(found))
        return
    rows = [(c.site, c.before or "-", c.after or "-", f"{c.bytes:+,}", f"{c.damage:+.3g}") for c in found.sites]
    rows += [(c.block, c.before or "-", c.after or "-", "", "") for c in found.blocks]
    title = "" if found.same_network else "The two plans are for different networks."
    shared.print_table(title, ("site", "A", "B", "bytes", "damage"), rows, numeric=(3, 4))
    print(f"{found.unchanged} sites alike; B has {found.bytes:+,} bytes and {found.damage:+.4g} damage against A")


def plan_file(path: str) -> Path:
    return Path(path) / "plan.json" if Path(path).is_dir() else Path(path)


def show_plan(plan: PlanFile, json: bool) -> None:
    from layerwise.plan.file import plan_text
    from layerwise.report.figures import megabytes, significant

    if json:
        print(plan_text(plan), end="")
        return

    def beside(step: Any) -> str:
        return "" if step is None else f"{step.recipe} ({step.bytes:+,} B, {step.damage:+.2g})"

    shared.print_table(
        f"{plan.network.name}: {megabytes(plan.predicted.bytes)}, "
        f"{8 * plan.predicted.bytes / plan.network.parameters:.3f} bpw for {plan.budget.asked}; predicted damage "
        f"{significant(plan.predicted.damage)} {plan.predicted.loss}",
        ("site", "chosen", "bytes", "bpw", "damage", "next better", "next cheaper"),
        [
            (
                name,
                s.recipe,
                f"{s.bytes:,}",
                f"{s.bpw:.2f}",
                significant(s.damage),
                beside(s.next_better),
                beside(s.next_cheaper),
            )
            for name, s in plan.sites.items()
        ],
        numeric=(2, 3, 4),
    )
