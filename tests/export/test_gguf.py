"""The GGUF export: exact types, refusals, what the ``gguf`` package reads, and llama.cpp's tokens where it is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.artifacts import artifact

from layerwise.encoding.ggml_blocks import TYPES
from layerwise.encoding.ggml_forms import blocks_of, form_of
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.sums import Sum
from layerwise.errors import InputError
from layerwise.export.gguf import changed, exact_type, export_gguf, near_type, nearest_type, rounded
from layerwise.export.gguf_networks import target_of
from layerwise.network.artifact import open_artifact
from layerwise.network.gguf_file import read_header


def integer(columns: int, **grid: object) -> GroupedInteger:
    weight = torch.randn(8, columns, generator=torch.Generator().manual_seed(1))
    fitted = fit_grid(weight, Grid(**grid))  # type: ignore[arg-type]
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


@pytest.mark.parametrize(
    ("grid", "columns", "wanted"),
    [
        ({"bits": 8, "group": 32, "symmetric": True}, 64, "Q8_0"),
        ({"bits": 5, "group": 64, "symmetric": True}, 64, "Q5_0"),
        ({"bits": 4, "group": 32, "symmetric": True}, 64, "Q4_0"),
        ({"bits": 4, "group": 64}, 128, "Q5_0"),  # a zero point widens the levels by a bit
        ({"bits": 3, "group": 64}, 128, "Q4_0"),
        ({"bits": 2, "group": 0, "symmetric": True}, 256, "TQ1_0"),  # unclipped, it uses -1, 0 and 1 alone
        ({"bits": 2, "group": 0}, 256, "TQ2_0"),
        ({"bits": 3, "group": 256, "symmetric": True}, 512, "Q3_K"),
        ({"bits": 4, "group": 256}, 512, "Q4_K"),
        ({"bits": 5, "group": 256}, 512, "Q5_K"),
        ({"bits": 6, "group": 256, "symmetric": True}, 512, "Q6_K"),
        ({"bits": 4, "group": 16, "symmetric": True}, 64, None),
        ({"bits": 8, "group": 32}, 64, None),
        ({"bits": 4, "group": 64, "symmetric": True}, 172, None),
    ],
)
def test_the_smallest_exact_type(grid: dict[str, object], columns: int, wanted: str | None):
    assert exact_type(integer(columns, **grid)) == wanted


def test_rounding_again_takes_a_type_that_is_wide_enough():
    form = integer(64, bits=4, group=16, symmetric=True)  # 5 bits a weight with its scales
    assert nearest_type(form) == "Q5_0" and nearest_type(integer(172, bits=4, group=64)) == "F16"
    again = rounded(form, "Q5_0")
    assert exact_type(again) in ("Q4_0", "Q5_0")
    error = (again.decode() - form.decode()).norm() / form.decode().norm()
    assert 0 < float(error) < 0.1


@pytest.mark.parametrize(("symmetric", "wanted", "share"), [(True, "Q4_0", 0.6), (False, "Q4_1", 0.02)])
def test_levels_are_kept_where_only_the_steps_are_not_exact(symmetric: bool, wanted: str, share: float):
    """A grid with zero points has no symmetric equal, so rounding to one costs fifty times as much."""
    form = integer(64, bits=4, group=32, symmetric=symmetric, scale_bits=8)
    assert exact_type(form) is None and near_type(form) == wanted
    weight = form.decode()
    kept, again = changed(form, wanted).decode(), rounded(form, "Q4_0").decode()
    assert float((kept - weight).abs().max()) <= float(weight.abs().max()) * 2**-9
    assert float((kept - weight).norm()) < share * float((again - weight).norm())


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_blocks_with_offsets_go_out_as_they_came_in(name: str):
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (6, 3, TYPES[name].nbytes)).astype(np.uint8)
    packed[:, :, :4] = np.abs(draw.normal(size=(6, 3, 2))).astype(np.float16).view(np.uint8)
    form = form_of(name, packed.reshape(6, -1), 96)
    assert isinstance(form, Sum) and exact_type(form) == name
    assert np.array_equal(blocks_of(name, form).reshape(packed.shape), packed)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_the_package_reads_every_tensor_bit_for_bit(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    out = artifact(request.getfixturevalue(name), tmp_path / "out", "rtn:bits=4,group=32,symmetric=true")
    done = export_gguf(out, tmp_path / "x.gguf", reencode=True)
    assert done.bytes == (tmp_path / "x.gguf").stat().st_size
    stored = open_artifact(out)
    target = target_of(stored.checkpoint.architecture)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for site in stored.sites:
        weight = (done.forms.get(site) or stored.encoded(site)).decode().numpy()
        check(gguf, found[target.place(f"{site}.weight")], target, f"{site}.weight", weight, stored)
    for parameter in stored.plain:
        value = stored.checkpoint.read_float(parameter)
        value = value.T if target.is_transposed(parameter) else value
        check(gguf, found[target.place(parameter)], target, parameter, value.numpy(), stored)
    assert len(found) == len(stored.sites) + len(stored.plain)


def check(gguf, tensor, target, parameter: str, weight: np.ndarray, stored) -> None:  # type: ignore[no-untyped-def]
    order = target.row_order(parameter, weight.shape[0], stored.config)
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
    assert np.array_equal(read, weight if order is None else weight[order]), parameter


def test_our_own_reader_agrees_and_bytes_repeat(tiny_llama: Path, tmp_path: Path):
    out = artifact(tiny_llama, tmp_path / "out", "rtn:bits=4,group=32,symmetric=true")
    for name in ("a", "b"):
        export_gguf(out, tmp_path / f"{name}.gguf", reencode=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    values, tensors = read_header(tmp_path / "a.gguf")
    assert values["general.architecture"] == "llama" and values["llama.attention.head_count_kv"] == 2
    assert tensors["blk.1.attn_q.weight"].kind.name == "Q4_0" and tensors["blk.0.ffn_down.weight"].kind.name == "F16"
    assert tensors["output_norm.weight"].kind.name == "F32" and "output.weight" not in tensors
    assert len(values["tokenizer.ggml.tokens"]) == tensors["token_embd.weight"].shape[0]


def test_what_cannot_be_expressed_is_refused_by_name(
    tiny_llama: Path, tiny_bert: Path, tiny_mistral: Path, tmp_path: Path
):
    out, file = artifact(tiny_llama, tmp_path / "out", "rtn:bits=4,group=32,symmetric=true"), tmp_path / "x.gguf"
    with pytest.raises(InputError, match=r"layers.0.mlp.down_proj.*172 columns.*--reencode"):
        export_gguf(out, file)
    with pytest.raises(InputError, match="BertModel"):
        export_gguf(artifact(tiny_bert, tmp_path / "bert", "rtn"), file)
    with pytest.raises(InputError, match="sliding window"):
        export_gguf(artifact(tiny_mistral, tmp_path / "mistral", "rtn"), file)
    assert not list(tmp_path.glob("*.gguf"))
    file.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        export_gguf(out, file, reencode=True)
    assert file.read_bytes() == b"mine"


def test_a_tokenizer_without_an_equal_is_refused(tiny_llama: Path, tmp_path: Path):
    import json

    out = artifact(tiny_llama, tmp_path / "out", "rtn:bits=4,group=32,symmetric=true")
    stored = json.loads((out / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {"type": "Whitespace"}
    (out / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="does not cut text into bytes"):
        export_gguf(out, tmp_path / "x.gguf", reencode=True)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("docs-lm", "rtn:bits=4,group=32,symmetric=true"), ("stories260k", "rtn:bits=8,group=32,symmetric=true")],
)
def test_llama_cpp_says_the_same(name: str, recipe: str, request: pytest.FixtureRequest, tmp_path: Path):
    """Tokens of a text, and the next token at every place; llama.cpp rounds activations to 8 bits, hence the margin."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    from layerwise.network.load import load

    source = (
        request.getfixturevalue("docs_lm") if name == "docs-lm" else request.getfixturevalue("shared") / "models" / name
    )
    out = artifact(source, tmp_path / "out", recipe)
    export_gguf(out, tmp_path / "x.gguf", reencode=name != "docs-lm")
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=128, n_threads=1, verbose=False, logits_all=True)
    tokenizer, network = AutoTokenizer.from_pretrained(out), load(out, dtype=torch.float32)
    for text in ("Once upon a time there was a", "it's  12345 — ünï 漢字!\n\tdef f(x):"):
        tokens = tokenizer(text).input_ids
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tokens
        theirs.reset()
        theirs.eval(tokens)
        with torch.inference_mode():
            ours = network(torch.tensor([tokens])).logits[0].float()
        scores = torch.tensor(np.array(theirs.scores[: len(tokens)]))
        assert float((scores - ours).abs().max()) < 0.05 * float(ours.abs().max())
        top = ours.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.5
        assert torch.equal(scores.argmax(-1)[clear], ours.argmax(-1)[clear])
