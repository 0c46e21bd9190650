"""A vision transformer's checkpoint from the command line: streamed like any other, with images for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.command import layerwise as run
from tests.vision import random_inputs

import layerwise

SMALL = ("--threads", "1", "--workers", "1", "--techniques", "two_sided:bits=4,group=32,rtn:bits=6,group=0")


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ViTForImageClassification``: two blocks of width 32 over 4 x 4 patches; image files lie beside it."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        config = ViTConfig(
            image_size=12, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_labels=4, initializer_range=0.2,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder / "model")
    for name, seed, count in (("calibrate", 1, 96), ("heldout", 2, 40)):
        content = {"images": random_inputs(count, 1, 12, 12, seed=seed), "labels": torch.arange(count) % 4}
        save_file(content, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(tiny_vit: Path) -> tuple[Path, dict]:
    out = tiny_vit / "OUT"
    done = run(
        "compress", tiny_vit / "model", out, "--budget", "9bpw", "--calibrate", tiny_vit / "calibrate.safetensors",
        "--evaluate", tiny_vit / "heldout.safetensors", *SMALL,
    )  # fmt: skip
    assert done.code == 0, done.err
    return out, json.loads((out / "evidence.json").read_text())


def test_it_is_compressed_and_measured(made: tuple[Path, dict]) -> None:
    out, evidence = made
    plan = next(row for row in evidence["rows"] if row["name"] == "plan")
    assert plan["bytes"] == (out / "model.safetensors").stat().st_size <= evidence["budget"]["bytes"]
    assert evidence["loss"] == {"name": "kl", "unit": "nats per example"}
    for row in evidence["rows"]:
        assert 0 <= row["quality"]["top1"]["value"] <= 1
    assert evidence["predicted"]["damage"] == pytest.approx(plan["quality"]["kl"]["value"], rel=1.0)


def test_it_loads_as_it_was_measured(tiny_vit: Path, made: tuple[Path, dict]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification

    out, evidence = made
    held_out = load_file(tiny_vit / "heldout.safetensors")
    dense = AutoModelForImageClassification.from_pretrained(tiny_vit / "model").eval()
    module = layerwise.load(out)
    assert type(module.vit.layers[0].mlp.fc1).__name__ == "PackedLinear"
    with torch.no_grad():
        p, q = (m(held_out["images"]).logits.log_softmax(-1) for m in (dense, module))
    plan = next(row for row in evidence["rows"] if row["name"] == "plan")
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(plan["quality"]["kl"]["value"], rel=1e-2)
    found = layerwise.evaluate(out, dense=tiny_vit / "model", text=(held_out["images"], held_out["labels"]))
    assert found.artifact["kl"] == pytest.approx(plan["quality"]["kl"]["value"], rel=1e-4)


def test_the_same_network_as_a_module_has_its_patches_encoded_too(tiny_vit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification

    module = ViTForImageClassification.from_pretrained(tiny_vit / "model").eval()
    images = load_file(tiny_vit / "calibrate.safetensors")["images"]
    result = layerwise.compress(
        module, tmp_path / "out", batches=images, uniform="rtn:bits=6,group=0", threads=1, workers=1
    )
    assert "vit.embeddings.patch_embeddings.projection" in result.applied.plan.sites
    loaded = layerwise.load(tmp_path / "out", into=ViTForImageClassification(module.config))
    with torch.no_grad():
        assert torch.isfinite(loaded(images[:4]).logits).all()
        same = loaded(images).logits.argmax(-1) == module(images).logits.argmax(-1)
    assert float(same.float().mean()) > 0.8


def test_mistakes_end_in_a_sentence(tiny_vit: Path, tmp_path: Path) -> None:
    asked = ("compress", tiny_vit / "model", tmp_path / "OUT", "--budget", "9bpw")
    save_file({"images": random_inputs(40, 3, 12, 12)}, tmp_path / "colour.safetensors")
    (tmp_path / "text.txt").write_text("a line\n")
    calibrate = tiny_vit / "calibrate.safetensors"
    for options, sentence in (
        ((), "reads images"),
        (("--calibrate", tmp_path / "text.txt"), "not a file of images"),
        (("--calibrate", tmp_path / "colour.safetensors"), "does not take"),
        (("--calibrate", calibrate, "--evaluate", calibrate), "also in"),
    ):
        done = run(*asked, *options)
        assert done.code == 2 and sentence in " ".join(done.err.split()), done.err
