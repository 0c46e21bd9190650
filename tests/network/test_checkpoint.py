from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from layerwise.errors import InputError
from layerwise.network import checkpoint as module
from layerwise.network import safetensors_file as files
from layerwise.network.checkpoint import open_checkpoint

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5), "ids": torch.arange(3)}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    files.write(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items(), {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "network"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    save(path / "model.safetensors", TENSORS)
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    save(folder / "model-1.safetensors", {"a.weight": TENSORS["a.weight"]})
    save(folder / "model-2.safetensors", {n: TENSORS[n] for n in ("b.weight", "ids")})
    placed = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors", "ids": "model-2.safetensors"}
    (folder / module.INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_reads(kind: str, request: pytest.FixtureRequest):
    path: Path = request.getfixturevalue(kind)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.architecture == "BertModel" and set(checkpoint.tensors) == set(TENSORS)
    assert torch.equal(checkpoint.read_float("a.weight"), TENSORS["a.weight"])
    assert torch.equal(checkpoint.read_rows("a.weight", torch.tensor([2, 0])), TENSORS["a.weight"][[2, 0]])
    assert (
        checkpoint.read_plain("a.weight").dtype == torch.float16 and checkpoint.read_plain("ids").dtype == torch.int64
    )
    assert checkpoint.safetensors_bytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_fingerprint_follows_the_contents(folder: Path):
    first = open_checkpoint(folder).fingerprint()
    assert len(first) == 64 and open_checkpoint(folder).fingerprint() == first
    whole = (folder / "model.safetensors").read_bytes()
    expected = hashlib.sha256(f"model.safetensors\0{len(whole)}\0".encode() + whole).hexdigest()
    assert first == expected
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert open_checkpoint(folder).fingerprint() != first


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ((torch.float32, torch.float32), torch.float16),
        ((torch.bfloat16, torch.float32), torch.bfloat16),
        ((torch.float16, torch.float16), torch.float16),
    ],
)
def test_storage_type(folder: Path, dtypes: tuple[torch.dtype, torch.dtype], stored: torch.dtype):
    save(folder / "model.safetensors", {"a": torch.ones(9, 9, dtype=dtypes[0]), "b": torch.ones(2, dtype=dtypes[1])})
    assert open_checkpoint(folder).storage_dtype == stored


def test_too_large_for_the_storage_type(folder: Path):
    save(folder / "model.safetensors", {"norm": torch.tensor([1e6])})
    with pytest.raises(InputError, match="norm holds values that float16 cannot hold"):
        open_checkpoint(folder).read_plain("norm")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_not_finite(folder: Path, value: float, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    bad = torch.ones(50)
    bad[40] = value
    save(folder / "model.safetensors", {"fine": torch.ones(30), "poor": bad.to(dtype)})
    with pytest.raises(InputError, match=f"poor in .* {kind} values"):
        open_checkpoint(folder).check_finite()


def test_progress_reaches_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 16)
    seen: list[tuple[int, int]] = []
    open_checkpoint(folder).check_finite(lambda done, total: seen.append((done, total)))
    assert len(seen) == 5 and seen[-1] == (68, 68) and seen == sorted(seen)


# ---------------------------------------------------------------- what is refused


def refused(path: Path | str, message: str) -> str:
    with pytest.raises(InputError, match=message) as raised:
        open_checkpoint(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_no_directory(tmp_path: Path, folder: Path):
    refused(tmp_path / "missing", "there is no directory")
    refused("../nowhere/at/all", "there is no directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is an empty directory")
    refused(folder / "config.json", "is a file; give the checkpoint's directory")


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no connection\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/some-network", r"could not be fetched from the hub either \(no connection\)")


def test_hub_id_is_fetched_without_pickles_or_code(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import fnmatch

    import huggingface_hub

    asked: dict[str, object] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: (asked.update(kwargs, name=name), str(folder))[1]
    )
    assert open_checkpoint("someone/some-network").directory == folder
    patterns: list[str] = asked["allow_patterns"]  # type: ignore[assignment]
    for unwanted in ("pytorch_model.bin", "modeling.py", "rust_model.ot", "training_args.pt"):
        assert not any(fnmatch.fnmatch(unwanted, pattern) for pattern in patterns)


def test_config(folder: Path):
    config = folder / "config.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": [3]}', "names no architecture"),
    ):
        config.write_text(text)
        refused(folder, message)
    config.write_bytes(b"\xff\xfe")
    refused(folder, "not valid JSON")
    config.unlink()
    refused(folder, "has no config.json")


def test_custom_code_is_refused_by_name(folder: Path):
    config = {"architectures": ["OddModel"], "auto_map": {"AutoModel": "modeling_odd.OddModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_odd.py").write_text("raise SystemExit('executed')")
    assert "no trust_remote_code" in refused(folder, "needs its own Python code for OddModel")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert open_checkpoint(folder).architecture == "BertModel"


def test_pickles_are_refused_with_a_command_that_converts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors and no")
    torch.save(TENSORS, folder / "pytorch_model.bin")
    message = refused(folder, "only pickled weights, which can run any code")
    code = message.partition('python -c "')[2].rpartition('"')[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert torch.equal(open_checkpoint(folder).read("a.weight"), TENSORS["a.weight"])


def test_damaged_weights(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-3])
    refused(folder, "is truncated")
    save(folder / "model.safetensors", {})
    refused(folder, "holds no tensors")


def test_shards(sharded: Path):
    index = json.loads((sharded / module.INDEX).read_text())
    for file in ("../model-1.safetensors", "/etc/passwd.safetensors", "sub/model-1.safetensors", "..", "model-1.bin"):
        (sharded / module.INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"a.weight": file}}))
        refused(sharded, "a shard must be a .safetensors file beside the index")
    for weight_map in (None, {}, {"a": 3}, []):
        (sharded / module.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(sharded, "has no weight_map")
    misplaced = index["weight_map"] | {"a.weight": "model-2.safetensors"}
    (sharded / module.INDEX).write_text(json.dumps({"weight_map": misplaced | {"c": "model-1.safetensors"}}))
    refused(sharded, "says that tensor 'a.weight' is in model-2.safetensors")
    (sharded / module.INDEX).write_text(json.dumps(index))
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, "lacks model-2.safetensors")
    shutil.copyfile(sharded / "model-1.safetensors", sharded / "model-2.safetensors")
    refused(sharded, "tensor 'a.weight' is in both")


# ---------------------------------------------------------------- companions


def test_companions(folder: Path):
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_evil.py", "notes.md", "generation_config.json"):
        (folder / name).write_text("{}")
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    save(folder / "2_Dense" / "model.safetensors", {"linear.weight": torch.ones(2, 2)})
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    checkpoint = open_checkpoint(folder)
    assert [c.place for c in checkpoint.companions] == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "generation_config.json",
        "modules.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    both = [folder / "model.safetensors", folder / "2_Dense" / "model.safetensors"]
    assert checkpoint.safetensors_bytes == sum(f.stat().st_size for f in both)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    refused(folder, "is a pickle")
    for bad in ('[{"path": "../elsewhere"}]', '[{"path": "/etc"}]', '[{"path": ".."}]', '[{"path": 3}]', "{", '["a"]'):
        (folder / "modules.json").write_text(bad)
        refused(folder, "modules")
