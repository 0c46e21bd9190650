"""``layerwise doctor``: what the packed products run on here, and whether they are right."""

from __future__ import annotations

import typer

from layerwise.cli import shared


def doctor(json: shared.Json = False) -> None:
    """Say what the packed products run on here, and test each of them; exit code 1 if one of them is wrong."""
    from dataclasses import asdict

    from layerwise.kernels.doctor import examine, gpu_self_test, self_test

    machine = examine()
    tests = self_test() if machine.paths else []
    if any(not gpu.decoded for gpu in machine.gpus):
        tests += gpu_self_test()
    if json:
        shared.print_json({**asdict(machine), "tests": [{**asdict(t), "passed": t.passed} for t in tests]})
    else:
        print(f"processor  {machine.processor}")
        print(f"features   {' '.join(machine.features) or 'none that the kernels use'}")
        print(f"threads    {machine.threads}" + (f", {machine.pool}" if machine.pool else ""))
        if machine.absent:
            print(f"kernels    none: {machine.absent}")
        else:
            print(f"kernels    {', '.join(machine.paths)}; taken: {machine.chosen or 'none, they are turned off'}")
            if machine.note:
                print(f"note       {machine.chosen}: {machine.note}")
        if machine.read is not None:
            print(f"reading    {machine.read / 1e9:.1f} GB/s")
        for gpu in machine.gpus:
            print(f"gpu        {gpu.name}: " + _products(gpu.decoded, machine.triton))
        if not machine.gpus:
            print("gpu        none that torch reaches")
        for test in tests:
            verdict = "right" if test.passed else "WRONG"
            print(f"{verdict}      {test.path:<10} {test.form:<15} {test.activations:<6} off by {test.error:.1e}")
    if not all(test.passed for test in tests):
        raise typer.Exit(1)


def _products(decoded: str, triton: str) -> str:
    return f"torch decodes and multiplies, {decoded}" if decoded else f"packed products by Triton {triton}"
