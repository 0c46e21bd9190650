"""Block influence against the direct computation, and what the paper's measure rests on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import layerwise
from layerwise.calibrate.passes import Calibration
from layerwise.probe.block_influence import all_gaps, angle, cosine_gap, unit
from layerwise.probe.measurement import Measurement


def probed(model: Path, text: Path, work: Path) -> tuple[Measurement, Calibration]:
    network = layerwise.open(model)
    calibration = layerwise.calibrate(network, str(text), work=work, sequences=48, length=32, threads=1)
    found = layerwise.probe(network, "block_influence", calibration)
    calibration.journal.close()
    return found, calibration


def directly(model: Path, calibration: Calibration) -> list[Tensor]:
    """Hidden states of all counted tokens at every boundary, by transformers itself."""
    import transformers

    network = transformers.AutoModel.from_pretrained(model).eval()
    inputs: list[list[Tensor]] = []
    last = network.get_submodule(
        layerwise.open(model).tree.blocks[-1].removeprefix("model.").removeprefix("transformer.")
    )
    outputs: list[Tensor] = []
    last.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for batch in calibration.splits.all:
        with torch.inference_mode():
            states = network(**batch.arguments(), output_hidden_states=True, use_cache=False).hidden_states
        # The last of transformers' states has been through the final norm; the block's own output has not.
        inputs.append([s[batch.counted] for s in (*states[:-1], outputs.pop())])
    return [torch.cat(parts) for parts in zip(*inputs, strict=True)]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_it_is_one_less_the_cosine(name: str, sentences: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(name)
    found, calibration = probed(model, sentences, tmp_path / "work")
    states = directly(model, calibration)
    assert found.data["tokens"] == len(states[0])
    for row, before, after in zip(found.rows, states, states[1:], strict=False):
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        change = (after - before).double().norm(dim=1) / before.double().norm(dim=1)
        influence, without, other, moved, turned = row.values
        assert influence == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
        assert moved == pytest.approx(float(change.mean()), rel=1e-4)
        assert turned == pytest.approx(float(cosine.clamp(-1, 1).arccos().mean()) / torch.pi, abs=1e-5)
        assert without is not None and without != influence
        assert other != influence


def test_padding_never_counts(tiny_bert: Path, sentences: Path, tmp_path: Path) -> None:
    _, calibration = probed(tiny_bert, sentences, tmp_path / "work")
    assert any(batch.mask is not None and not bool(batch.counted.all()) for batch in calibration.splits.all)
    before = layerwise.probe(calibration.network, "block_influence", calibration)
    for boundary in calibration.inputs():
        values = [boundary.read(i) for i in range(len(boundary.shapes))]
        for value, batch in zip(values, calibration.splits.all, strict=True):
            value[~batch.counted] = 1e3
        boundary.write(iter(values))
    assert layerwise.probe(calibration.network, "block_influence", calibration) == before


def silenced(model: Path, target: Path, block: int) -> Path:
    """A copy in which a block's output projections are zero: it returns its input."""
    copy = Path(shutil.copytree(model, target))
    tensors = load_file(copy / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{block}.{name}.weight"].zero_()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_block_that_does_nothing_has_none(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    copy = silenced(tiny_llama, tmp_path / "copy", 1)
    found, _ = probed(copy, sentences, tmp_path / "work")
    first, second = found.rows
    assert second.values[0] == 0 and second.values[3] == 0 and second.values[4] == 0
    assert float(first.values[0] or 0) > 0.01
    assert float(second.values[2] or 0) > 0.1  # the control still sees two tokens
    assert "block 1 turns states least" in found.summary


def test_it_tells_harmless_blocks_from_harmful_ones(docs_lm: Path, sentences: Path, tmp_path: Path) -> None:
    """Without the idea (taking the block of the highest influence, or any) dropping costs far more."""
    import transformers

    found, calibration = probed(docs_lm, sentences, tmp_path / "work")
    influence = [float(v) for v in found.column("influence").values() if isinstance(v, float)]
    network = transformers.AutoModelForCausalLM.from_pretrained(docs_lm).eval()
    layers, batch = network.model.layers, calibration.splits.all[0]

    def loss(dropped: int | None) -> float:
        hooks = []
        if dropped is not None:
            hooks.append(layers[dropped].register_forward_hook(lambda _m, args, _o: args[0]))
        with torch.inference_mode():
            value = float(network(batch.tokens[:16], labels=batch.tokens[:16], use_cache=False).loss)
        for hook in hooks:
            hook.remove()
        return value

    rise = [loss(i) - loss(None) for i in range(len(layers))]
    least, most = influence.index(min(influence)), influence.index(max(influence))
    assert rise[least] < rise[most]
    assert rise[least] <= sorted(rise)[len(rise) // 2]  # no worse than the middle block


def test_small_angles_are_exact() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[1.0, 1e-6], [0.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    gap = cosine_gap(unit(a), unit(b))
    assert gap[0] == pytest.approx(5e-13, rel=1e-6)
    assert gap[1:].tolist() == [0.0, 1.0, 2.0]
    assert angle(gap)[0] == pytest.approx(1e-6 / torch.pi, rel=1e-6)
    assert angle(gap)[1:].tolist() == pytest.approx([0.0, 0.5, 1.0])
    every = all_gaps(torch.stack([unit(a), unit(b)]))  # [tokens, 2, 2]
    assert every[:, 0, 1].tolist() == pytest.approx(gap.tolist(), abs=1e-12)


def test_it_needs_a_calibration(tiny_llama: Path) -> None:
    from layerwise.probe.block_influence import BlockInfluence

    with pytest.raises(layerwise.InputError, match="calibration"):
        BlockInfluence().measure(layerwise.open(tiny_llama), None)
