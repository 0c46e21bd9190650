"""The verbs about kernels: what they print, and what they refuse. Nothing that is timed is judged."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

from layerwise.cli.main import app
from layerwise.errors import InputError
from layerwise.kernels import doctor, library, measure
from layerwise.kernels.gpu import Gpu
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.matrix import PackedMatrix
from layerwise.kernels.samples import SAMPLES, SPARSE_SAMPLES, reference

compiled = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


@compiled
@pytest.mark.parametrize("form", SAMPLES)
def test_the_self_tests_reference_is_what_the_kernel_decodes(form: str):
    stored = SAMPLES[form].draw(20, 150)
    assert torch.equal(PackedMatrix(stored).decode(), reference(stored))


@compiled
def test_doctor_tests_every_product_on_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "READ_BYTES", 1 << 20)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said["paths"] == list(paths()) and said["chosen"] in paths() and said["read"] > 0
    tested = {(t["path"], t["form"], t["activations"]) for t in said["tests"] if t["passed"]}
    assert len(tested) == len(paths()) * (2 * len(SAMPLES) - 1 + len(SPARSE_SAMPLES))
    text = CliRunner().invoke(app, ["doctor"]).output
    assert all(path in text for path in paths()) and "GB/s" in text and "WRONG" not in text


@compiled
def test_doctor_says_what_was_never_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "READ_BYTES", 1 << 20)
    assert set(doctor.NOTES) < set(library.KNOWN_PATHS)
    monkeypatch.setattr(doctor, "NOTES", {paths()[0]: "never measured"})
    monkeypatch.setenv(library.VARIABLE, paths()[0])
    assert f"note       {paths()[0]}: never measured" in CliRunner().invoke(app, ["doctor"]).output


@compiled
def test_doctor_fails_when_a_product_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "reference", lambda stored: reference(stored) * 1.1)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "WRONG" in done.output


def test_doctor_says_what_multiplies_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "library", lambda: None)
    monkeypatch.setattr(doctor, "paths", lambda: ())
    assert "gpu        none" in CliRunner().invoke(app, ["doctor"]).output or doctor.gpus()
    monkeypatch.setattr(doctor, "gpus", lambda: (Gpu("A GPU", "triton cannot be imported"),))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "A GPU: torch decodes and multiplies, triton cannot be imported" in done.output
    monkeypatch.setattr(doctor, "gpus", lambda: (Gpu("A GPU", ""),))
    monkeypatch.setattr(doctor, "triton_version", lambda: "3.9.0")
    monkeypatch.setattr(doctor, "gpu_self_test", lambda: [doctor.Test("triton, 1", "int4", "exact", 0.5)])
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "A GPU: packed products by Triton 3.9.0" in done.output and "WRONG" in done.output


def test_doctor_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "library", lambda: None)
    monkeypatch.setattr(doctor, "paths", lambda: ())
    monkeypatch.setattr(doctor, "why_absent", lambda: "they were not compiled")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0 and "none: they were not compiled" in done.output


@compiled
def test_bench_prints_a_row_for_every_form_shape_and_batch(monkeypatch: pytest.MonkeyPatch):
    small = functools.partial(measure.measure, set_bytes=1 << 16, forms=("int4", "levels4", "half kept, fp16"))
    monkeypatch.setattr(measure, "measure", small)
    asked = ["bench", "kernels", "--shapes", "64x128,32x64", "--batches", "1,3", "--rounds", "1"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 2 * 2 * 7  # float32, bfloat16 and int8 activations of one form, float ones of the others
    assert all(row["microseconds"] > 0 and row["share"] > 0 and row["over_fp32"] > 0 for row in rows)
    assert all((row["of_dots"] > 0) == (row["form"] == "int4") for row in rows)
    assert "64 x 128" in CliRunner().invoke(app, asked).output


@compiled
def test_what_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    for wrong in ({"rounds": 0}, {"batches": (0,)}, {"shapes": ((0, 4),)}, {"shapes": ((4, 1 << 20),)}):
        with pytest.raises(InputError):
            measure.measure(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too small"):
        measure.measure(shapes=((16, 16),), batches=(1,))
    for asked in (["--shapes", "4096"], ["--batches", "1x2"], ["--shapes", "axb"]):
        done = CliRunner().invoke(app, ["bench", "kernels", *asked])
        assert isinstance(done.exception, InputError) and "are written" in str(done.exception)
    monkeypatch.setenv(library.VARIABLE, "off")
    with pytest.raises(InputError, match="turned off"):
        measure.measure()
