"""Networks whose blocks are arranged, compressed: measured at every use, stored once, reloaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.test_compress import finished
from torch import Tensor

from layerwise.acts.prepare import Options
from layerwise.calibrate import passes
from layerwise.calibrate.passes import Calibration, Part, forward, reverse
from layerwise.compress import start
from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.sites import measure_changes
from layerwise.network.arranged import arranged, write_arranged
from layerwise.network.arrangement import Arrangement, Extras, Step, arrangement
from layerwise.network.artifact import open_artifact
from layerwise.network.network import open_network
from layerwise.sensitivity.kronecker import damage

ARRANGED = {
    "pair": arrangement([0, [1, 2], 3]),
    "loop": arrangement([0, 1, 2, 1, 2, 3]),
    "newton": arrangement([0, Step((1, 2, 3), "newton", 2), 0]),
}
TOKENS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def deep(build: Any, causal_tokenizer: Any) -> Path:
    from tests.conftest import DECODER
    from transformers import LlamaConfig, LlamaForCausalLM

    made: Path = build(
        LlamaForCausalLM, LlamaConfig, causal_tokenizer, 31, tie_word_embeddings=True,
        **DECODER | {"num_hidden_layers": 4},
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def written(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("arranged")
    for name, wanted in ARRANGED.items():
        write_arranged(arranged(open_network(deep), wanted), folder / name)
    return {name: folder / name for name in ARRANGED}


def options(model: Path, work: Path, text: Path, **more: Any) -> Options:
    return Options(
        model=str(model), out=str(work.with_name("out")), work=str(work), budget="100%", calibrate=str(text),
        sequences=96, length=16, threads=1, workers=1, **more,
    )  # fmt: skip


def calibrated(model: Path, work: Path, text: Path) -> Calibration:
    _, calibration, _ = start(options(model, work, text), Stopwatch())
    forward(calibration, Stopwatch())
    return calibration


def test_parts_share_no_block() -> None:
    assert ARRANGED["pair"].parts() == (range(1), range(1, 2), range(2, 3))
    assert ARRANGED["loop"].parts() == (range(1), range(1, 5), range(5, 6))
    assert ARRANGED["newton"].parts() == (range(3),)
    assert arrangement([0, 1, 0, 2, 3, 3]).parts() == (range(3), range(3, 4), range(4, 6))


# ---------------------------------------------------------------- what is measured


Sums = dict[str, tuple[Tensor, Tensor, Tensor, int]]


def sums_of(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> Sums:
    """Site -> sums of x x^T, M M^T and M^T M over the fit tokens, and their number."""
    found: Sums = {}
    own = passes.fitted_sites

    def fitted(moments: Any, names: Any, loss: Any) -> Any:
        for name in names:
            site = moments["fit"].sites[name]
            if site.left is not None:
                sides = (site.inputs.sum, site.left, site.right)
                found[name] = (*(side.clone() for side in sides), site.inputs.count)  # type: ignore[assignment]
        return own(moments, names, loss)

    with monkeypatch.context() as patched:
        patched.setattr(passes, "fitted_sites", fitted)
        for _ in reverse(calibration, ()):
            pass
    return found


def test_a_loop_is_measured_at_every_use(
    deep: Path, written: dict[str, Path], sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are those of the same blocks written out one behind the other, added up over their copies."""
    import transformers

    order = (0, 1, 2, 1, 2, 3)
    config = transformers.AutoConfig.from_pretrained(deep)
    config.num_hidden_layers = len(order)
    config.layer_types = None
    dense = transformers.LlamaForCausalLM.from_pretrained(deep)
    long = transformers.LlamaForCausalLM(config)
    state = {k: v for k, v in dense.state_dict().items() if ".layers." not in k}
    for place, block in enumerate(order):
        for name, value in dense.model.layers[block].state_dict().items():
            state[f"model.layers.{place}.{name}"] = value
    long.load_state_dict(state)
    long.save_pretrained(tmp_path / "long")
    for file in deep.glob("tokenizer*"):
        (tmp_path / "long" / file.name).write_bytes(file.read_bytes())
    looped = sums_of(calibrated(written["loop"], tmp_path / "one", sentences), monkeypatch)
    unrolled = sums_of(calibrated(tmp_path / "long", tmp_path / "two", sentences), monkeypatch)
    assert len(looped) == 4 * 7 and len(unrolled) == 6 * 7
    for name, sums in looped.items():
        block, rest = int(name.split(".")[2]), name.split(".", 3)[3]
        copies = [unrolled[f"model.layers.{i}.{rest}"] for i, b in enumerate(order) if b == block]
        assert sums[3] == sum(copy[3] for copy in copies)
        for side in range(3):
            torch.testing.assert_close(sums[side], sum(copy[side] for copy in copies), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pair", "newton"])
def test_predicted_damage_is_what_a_change_does(
    name: str, written: dict[str, Path], sentences: Path, tmp_path: Path
) -> None:
    """A little noise on one matrix at a time: predicted and measured loss, summed over the sites of all blocks."""
    from layerwise.encoding.dense import Dense

    calibration = calibrated(written[name], tmp_path / "work", sentences)
    network, draw = calibration.network, torch.Generator().manual_seed(1)
    parts: dict[str, Part] = {site: part for part in reverse(calibration, ()) for site in part.sites}
    sites = [s for s in network.tree.sites if s.block is not None]
    predicted, changes = [], []
    for site in sites:
        weight = network.read_site(site)
        moved = weight + 0.03 * float(weight.std()) * torch.randn(weight.shape, generator=draw)
        predicted.append(damage(moved - weight, parts[site.name].sites[site.name].fit))
        changes.append({site.name: lambda moved=moved: Dense(moved)})
    splits = calibration.splits
    measured = measure_changes(network, changes, calibration.loss, splits.fit)  # type: ignore[arg-type]
    for block in network.tree.blocks:
        mine = [i for i, site in enumerate(sites) if site.block == block]
        ratio = sum(predicted[i] for i in mine) / sum(measured[i] for i in mine)
        assert 0.5 < ratio < 2, (block, ratio)


# ---------------------------------------------------------------- the whole job


def outputs(path: Path) -> Tensor:
    import transformers

    module = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: Tensor = module(input_ids=TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", list(ARRANGED))
def test_the_artifact_is_arranged_and_stores_blocks_once(
    name: str, deep: Path, written: dict[str, Path], sentences: Path, tmp_path: Path
) -> None:
    """It reloads in transformers and says what its decoded weights say, arranged the same way."""
    run = finished(
        written[name], tmp_path / "out", sentences, "--budget", "6bpw", "--techniques", "gptq:bits=4", "--no-baseline"
    )
    artifact = open_artifact(run.out)
    assert artifact.arrangement == ARRANGED[name].renumbered()[0]
    assert run.size == run.plan["predicted"]["bytes"] <= run.budget < open_network(deep).checkpoint.safetensors_bytes
    blocks = {key.split(".")[2] for key in artifact.checkpoint.tensors if ".layers." in key}
    assert blocks == {"0", "1", "2", "3"} and len(artifact.sites) > 4 * 4
    rows = {row["name"]: row["quality"]["kl"]["value"] for row in run.evidence["rows"]}
    assert 0 == rows["dense"] < rows["plan"]
    assert run.evidence["predicted"]["measured"] == pytest.approx(run.evidence["predicted"]["damage"], rel=0.8)
    other = arranged(open_network(deep), ARRANGED[name])
    values = {n: artifact.read(n) for n, _ in other.module.named_parameters()}
    decoded = tmp_path / "dense"
    write_arranged(other, decoded)
    save_file(values, decoded / "model.safetensors", metadata={"format": "pt"})
    found, wanted = outputs(run.out), outputs(decoded)
    assert float((found - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())
    assert json.loads((run.out / "config.json").read_text())["num_hidden_layers"] == ARRANGED[name].uses


def test_what_a_use_has_of_its_own_is_kept(deep: Path, sentences: Path, tmp_path: Path) -> None:
    """A norm and a low-rank correction of the second run of a block, at 16 bits beside its encoded matrices."""
    network, draw = open_network(deep), torch.Generator().manual_seed(0)
    extras = {2: Extras(("input_layernorm.weight",), {"self_attn.q_proj": 4})}
    out, into = network.module.get_parameter("model.layers.1.self_attn.q_proj.weight").shape
    values = {
        "2.own.input_layernorm.weight": 1.3 * network.read("model.layers.1.input_layernorm.weight"),
        "2.left.self_attn.q_proj.weight": 0.1 * torch.randn(out, 4, generator=draw),
        "2.right.self_attn.q_proj.weight": 0.1 * torch.randn(4, into, generator=draw),
    }
    tied = Arrangement(tuple(Step((block,)) for block in (0, 1, 1, 2)), extras)
    write_arranged(arranged(network, tied, values), tmp_path / "tied")
    run = finished(
        tmp_path / "tied", tmp_path / "out", sentences, "--budget", "6bpw", "--techniques", "gptq:bits=4",
        "--no-baseline",
    )  # fmt: skip
    artifact = open_artifact(run.out)
    assert artifact.arrangement == tied and run.size == run.plan["predicted"]["bytes"]
    for name, value in values.items():
        assert torch.equal(artifact.read(f"model.layers.uses.{name}"), value.half().float())
    dense, found = outputs(tmp_path / "tied"), outputs(run.out)
    assert float((dense - found).abs().mean()) < 0.3 * float(dense.abs().mean())


def test_a_uniform_setting_needs_no_gradients(written: dict[str, Path], sentences: Path, tmp_path: Path) -> None:
    run = finished(written["loop"], tmp_path / "out", sentences, "--uniform", "gptq:bits=4,group=32")
    assert {e["recipe"] for e in run.plan["sites"].values()} <= {"gptq:bits=4,group=32", "rtn:bits=4,group=32"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"sequential": True}, "--sequential works on blocks that run once"),
        ({"tune": "signround:steps=2"}, "--tune works on blocks"),
        ({"techniques": ("gptq", "drop_block")}, "drop_block works on blocks"),
        ({"techniques": ("awq+gptq",)}, r"awq\+gptq\S* works on blocks"),
        ({"techniques": ("rsq",)}, "reads the attention of one block"),
        ({"target": "vllm"}, "knows no arrangement"),
    ],
)
def test_what_needs_blocks_in_order_is_refused(
    asked: dict[str, Any], says: str, written: dict[str, Path], sentences: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        start(options(written["pair"], tmp_path / "work", sentences, **asked), Stopwatch())
    assert not (tmp_path / "work").exists()
