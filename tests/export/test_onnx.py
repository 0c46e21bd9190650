"""The ONNX export: what ONNX Runtime computes is what our own modules compute, at the artifact's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.export.artifacts import artifact

from layerwise.errors import InputError

MARGIN = 1e-5  # of the largest output; both sides compute in float32


@pytest.fixture(scope="module")
def runtime() -> Any:
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


def exported(runtime: Any, out: Path, reencode: bool = False) -> tuple[Any, Any]:
    """The export's session and what the export returned."""
    from layerwise.export.onnx import export_onnx

    done = export_onnx(out, out.with_name("onnx"), reencode=reencode, force=True)
    assert done.bytes == sum(p.stat().st_size for p in out.with_name("onnx").glob("model.onnx*"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(out.with_name("onnx") / "model.onnx")
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), done


def ran(session: Any, **inputs: Any) -> dict[str, np.ndarray]:
    given = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    batch = given["input_ids"].shape[0]
    for place in session.get_inputs():
        if place.name.startswith("past") and place.name not in given:
            given[place.name] = np.zeros((batch, place.shape[1], 0, place.shape[3]), np.float32)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))


def close(found: np.ndarray, wanted: torch.Tensor, shown: torch.Tensor | None = None) -> None:
    error = np.abs(found - wanted.numpy())
    if shown is not None:
        error = error * shown.numpy()[..., None]
    assert error.max() <= MARGIN * max(1.0, float(wanted.abs().max())), error.max()


def tokens(rows: int = 2, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers, and a mask that pads the second text on the left."""
    drawn = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(drawn)
    mask[1, :3] = 0
    return drawn, mask


DECODERS = ("tiny_llama", "tiny_qwen2", "tiny_gpt2")
RECIPES = (
    "rtn:bits=4,group=64",
    "rtn:bits=3,group=32,symmetric=true",
    "rtn:bits=2,group=16,scale_bits=8",
    "rtn:bits=8,group=0",
    "rtn:bits=5,group=20",
    "nf4:group=32",
    "ternary:group=64",
    "ptqtp",
    "bivit",
    "hqq:group=64",
    "caldera",
    "dense",
)


def check_decoder(runtime: Any, out: Path) -> None:
    from layerwise.network.load import load

    session, _ = exported(runtime, out)
    drawn, mask = tokens()
    found = ran(session, input_ids=drawn, attention_mask=mask)
    network = load(out, dtype=torch.float32)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = network(input_ids=drawn, attention_mask=mask, position_ids=positions).logits
    close(found["logits"], wanted, mask)
    first = ran(session, input_ids=drawn[:, :5], attention_mask=mask[:, :5])
    past = {name.replace("present", "past_key_values"): v for name, v in first.items() if name != "logits"}
    rest = ran(session, input_ids=drawn[:, 5:], attention_mask=mask, **past)
    close(rest["logits"], torch.from_numpy(found["logits"][:, 5:]))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_and_without_a_past(name: str, runtime: Any, request: pytest.FixtureRequest, tmp_path: Path):
    check_decoder(runtime, artifact(request.getfixturevalue(name), tmp_path / "out", RECIPES[0]))


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_every_form_that_has_an_equal(recipe: str, runtime: Any, tiny_llama: Path, tmp_path: Path):
    check_decoder(runtime, artifact(tiny_llama, tmp_path / "out", recipe))


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_bert_classifier"])
def test_encoders(name: str, runtime: Any, request: pytest.FixtureRequest, tmp_path: Path):
    from layerwise.network.load import load

    out = artifact(request.getfixturevalue(name), tmp_path / "out", "rtn:bits=4,group=16", "rtn:bits=8,group=0")
    session, _ = exported(runtime, out)
    drawn, _ = tokens()
    mask = torch.ones_like(drawn)
    mask[1, 5:] = 0
    found = ran(session, input_ids=drawn, attention_mask=mask, token_type_ids=torch.zeros_like(drawn))
    with torch.inference_mode():
        wanted = load(out, dtype=torch.float32)(input_ids=drawn, attention_mask=mask)
    if name == "tiny_bert":
        close(found["last_hidden_state"], wanted.last_hidden_state, mask)
        close(found["pooler_output"], wanted.pooler_output)
    else:
        close(found["logits"], wanted.logits)


def test_the_files_stay_as_small_as_the_artifact(runtime: Any, docs_lm: Path, tmp_path: Path):
    from layerwise.network.artifact import open_artifact

    out = artifact(docs_lm, tmp_path / "out", "rtn:bits=4,group=64,clip=false")
    _, done = exported(runtime, out)
    graph = (tmp_path / "onnx" / "model.onnx").stat().st_size
    assert done.bytes - graph < 1.01 * open_artifact(out).size and graph < 100_000
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()
    data = (tmp_path / "onnx" / "model.onnx.data").read_bytes()
    exported(runtime, out)
    assert (tmp_path / "onnx" / "model.onnx.data").read_bytes() == data


def test_a_form_without_an_equal_is_refused_or_rounded(runtime: Any, tiny_llama: Path, tmp_path: Path):
    from layerwise.network.artifact import open_artifact

    out = artifact(tiny_llama, tmp_path / "out", "gwq", "rtn:bits=8,group=64")
    with pytest.raises(InputError, match=r"no exact equal for site model\.layers\.0.*--reencode"):
        exported(runtime, out)
    assert not (tmp_path / "onnx").exists()
    _, done = exported(runtime, out, reencode=True)
    stored = open_artifact(out)
    assert len(done.forms) == 14
    for site, form in done.forms.items():
        weight = stored.encoded(site).decode()
        assert float((form.decode() - weight).norm() / weight.norm()) < 0.15
    pruned = artifact(tiny_llama, tmp_path / "pruned", "magnitude", "dense")
    _, done = exported(runtime, pruned)
    assert len(done.widened) == 14 and not done.forms


def test_architectures_are_refused_by_name(runtime: Any, tiny_mixtral: Path, tiny_mistral: Path, tmp_path: Path):
    with pytest.raises(InputError, match="MixtralForCausalLM"):
        exported(runtime, artifact(tiny_mixtral, tmp_path / "out", "rtn"))
    with pytest.raises(InputError, match="sliding window"):
        exported(runtime, artifact(tiny_mistral, tmp_path / "out", "rtn"))
    assert not (tmp_path / "onnx").exists()


def test_minilm(runtime: Any, minilm: Path, tmp_path: Path):
    from layerwise.network.load import load

    out = artifact(minilm, tmp_path / "out", "rtn:bits=4,group=64,clip=false")
    session, done = exported(runtime, out)
    drawn, _ = tokens()
    mask = torch.ones_like(drawn)
    found = ran(session, input_ids=drawn, attention_mask=mask, token_type_ids=torch.zeros_like(drawn))
    with torch.inference_mode():
        wanted = load(out, dtype=torch.float32)(input_ids=drawn, attention_mask=mask)
    close(found["last_hidden_state"], wanted.last_hidden_state)
    assert done.bytes < 13e6  # of 90.9 MB in float32
