"""The command ``layerwise``: one file per verb, each of which parses, calls and prints.

Nothing heavy is imported before a verb runs, so that help and completion answer at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import typer

from layerwise.cli import (
    bench,
    calibrate,
    compare,
    compress,
    depth,
    doctor,
    evaluate,
    export,
    fit,
    generate,
    import_,
    inspect,
    papers,
    plan,
    probe,
    report,
    reshape,
    search,
    train,
    tune,
)

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer does not export it by name

app = typer.Typer(
    name="layerwise",
    help="Open a trained network, measure every layer, plan under a byte budget, rebuild it smaller, prove it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("inspect")(inspect.inspect)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(plan.app, name="plan")
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("probe")(probe.probe)
app.command("depth")(depth.depth)
app.command("report")(report.report)
app.command("papers")(papers.papers)
app.command("compare")(compare.compare)
app.command("bench")(bench.bench)
app.command("reshape")(reshape.reshape)
app.command("train")(train.train)
app.command("search")(search.search)
app.command("tune")(tune.tune)
app.command("fit")(fit.fit)
app.command("doctor")(doctor.doctor)


RESUMABLE = ("compress", "calibrate", "plan", "reshape", "tune")
INTERRUPTED = 130


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2, an interrupt is 130."""
    from layerwise.engine.memory import one_pool
    from layerwise.errors import InputError
    from layerwise.network.light_imports import own_process

    one_pool()
    own_process()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(prog_name="layerwise", standalone_mode=False)  # typer turns an interrupt into this code
    except InputError as mistake:
        _refuse(str(mistake))
    except UsageError as mistake:
        if not str(mistake).strip():  # nothing was given, and help has been printed
            sys.exit(2)
        _refuse(usage_sentence(mistake))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        sys.exit(1)
    if code == INTERRUPTED:
        print("layerwise: interrupted" + resume_hint(), file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(sentence: str) -> NoReturn:
    print(f"layerwise: {sentence}", file=sys.stderr)
    sys.exit(2)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def usage_sentence(mistake: Any) -> str:
    """What typer says about an option it cannot read, as one sentence that ends in where to look."""
    said = " ".join(mistake.format_message().split()).rstrip(".")
    path = mistake.ctx.command_path if mistake.ctx is not None else "layerwise"
    return f"{said[:1].lower()}{said[1:]}; see {path} --help"


def resume_hint() -> str:
    """The command that continues: the same one, where what was finished lies in a work folder."""
    import shlex

    if not (sys.argv[1:] and sys.argv[1] in RESUMABLE):
        return ""
    return "; what is finished is kept, and the same command continues: layerwise " + shlex.join(sys.argv[1:])


if __name__ == "__main__":
    main()
