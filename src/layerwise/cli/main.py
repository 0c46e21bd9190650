"""The command ``layerwise``: one file per verb, each of which parses, calls and prints.

Nothing heavy is imported before a verb runs, so that help and completion answer at once.
"""

from __future__ import annotations

import signal
import sys

import typer

from layerwise.cli import calibrate, compress, evaluate, export, inspect, plan, report

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
app.command("export")(export.export)
app.command("report")(report.report)


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2, an interrupt is 130."""
    from layerwise.errors import InputError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(prog_name="layerwise")
    except InputError as mistake:
        print(f"layerwise: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("layerwise: interrupted; " + resume_hint(), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def resume_hint() -> str:
    """The command that continues: the same one."""
    import shlex

    return "what is finished is kept, and the same command continues: layerwise " + shlex.join(sys.argv[1:])


if __name__ == "__main__":
    main()
