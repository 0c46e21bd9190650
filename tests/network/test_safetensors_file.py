from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import InputError
from layerwise.network import safetensors_file as files

TENSORS = {
    "half": torch.arange(35).reshape(5, 7).half(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "brain": torch.arange(6).reshape(2, 3).bfloat16(),
    "long": torch.arange(4),
    "größe": torch.ones(2, 2, dtype=torch.float64),
}
LAYOUT = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    files.write(path, LAYOUT, TENSORS.items(), {"format": "pt"})
    return path


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_reads_what_we_write(file: Path):
    loaded = safetensors.torch.load_file(file)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert file.stat().st_size == files.file_size(LAYOUT, {"format": "pt"})


def test_we_read_what_safetensors_writes(tmp_path: Path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"format": "pt"})
    found, metadata = files.read_header(path)
    assert metadata == {"format": "pt"}
    assert all(torch.equal(files.read(found[name]), tensor) for name, tensor in TENSORS.items())


def test_bytes_do_not_depend_on_the_order_of_production(tmp_path: Path, file: Path):
    for number, produce in enumerate((reversed(TENSORS.items()), TENSORS.__getitem__)):
        other = tmp_path / f"{number}.safetensors"
        files.write(other, dict(reversed(LAYOUT.items())), produce, {"format": "pt"})
        assert other.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("chunk", [8, 4 << 20])
def test_float32_in_chunks(file: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    found, _ = files.read_header(file)
    for name, tensor in TENSORS.items():
        out = torch.full(tensor.shape, float("nan"))
        assert files.read_float(found[name], out) is out
        assert torch.equal(out, tensor.float())


def test_a_buffer_is_reused(file: Path):
    found, _ = files.read_header(file)
    buffer = torch.empty(100, dtype=torch.uint8)
    half = files.read(found["half"], buffer)
    assert torch.equal(half, TENSORS["half"]) and half.data_ptr() == buffer.data_ptr()
    with pytest.raises(ValueError, match="at least 70 bytes"):
        files.read(found["half"], torch.empty(69, dtype=torch.uint8))


@given(st.lists(st.integers(0, 4), max_size=12))
def test_rows(tmp_path_factory: pytest.TempPathFactory, wanted: list[int]):
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    if not path.exists():
        files.write(path, LAYOUT, TENSORS.items())
    info = files.read_header(path)[0]["half"]
    index = torch.tensor(wanted, dtype=torch.int64)
    assert torch.equal(files.read_rows(info, index), TENSORS["half"][index])


def test_rows_outside_are_refused(file: Path):
    info = files.read_header(file)[0]["half"]
    for outside in (-1, 5):
        with pytest.raises(IndexError, match="0 to 4"):
            files.read_rows(info, torch.tensor([0, outside]))


def test_consecutive_rows_are_read_together(file: Path, monkeypatch: pytest.MonkeyPatch):
    info = files.read_header(file)[0]["half"]
    reads: list[int] = []
    fill = files._fill
    monkeypatch.setattr(files, "_fill", lambda d, i, b, s: (reads.append(b.numel()), fill(d, i, b, s)))
    files.read_rows(info, torch.tensor([4, 1, 2, 1]))
    assert reads == [28, 14]


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5000), max_size=3).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(list(files.NAMES)), shapes), max_size=12)


@given(layouts, st.none() | st.dictionaries(names, names, max_size=2))
def test_shares_bound_the_header(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]):
    header = files.header_bytes(layout, metadata)
    size = files.file_size(layout, metadata)
    for below in (10**13, size + 1):
        shares = sum(files.header_share(name, *what, below) for name, what in layout.items())
        assert len(header) <= shares + files.header_fixed(metadata)
    assert len(header) % 8 == 0


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "opening brace"),
        (b'{"a":', b"", "not valid JSON"),
        (b"{" * 100_000, b"", "not valid JSON"),
        (b'{"\xff":1}', b"", "not valid JSON"),
        (b'{"\\ud800":1}', b"", "not valid JSON"),
        (b'{"a":1,"a":1}', b"", "'a' occurs twice"),
        ({"a": 3}, b"", "'a' must have exactly"),
        ({"a": entry() | {"more": 1}}, b"", "must have exactly"),
        ({"a": entry(dtype="F99")}, b"", "unknown dtype 'F99'"),
        ({"a": entry(dtype=["U8"])}, b"", "unknown dtype"),
        ({"a": entry(shape=[-4])}, b"abcd", "non-negative"),
        ({"a": entry(shape=[True])}, b"a", "non-negative"),
        ({"a": entry(shape=[1] * 40)}, b"a", "at most 32"),
        ({"a": entry(shape=[2**59, 2**59, 0], offsets=(0, 0))}, b"", "too large"),
        ({"a": entry(offsets=[0, 4.0])}, b"abcd", "data_offsets"),
        ({"a": entry(offsets=[4, 0])}, b"abcd", "before it begins"),
        ({"a": entry(offsets=[0, 3])}, b"abc", "must have 4 bytes, not 3"),
        ({"a": entry()}, b"abc", "is truncated: tensor 'a'"),
        ({"a": entry()}, b"abcde", "1 bytes follow"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, b"abcdef", "'b' overlaps"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, b"abcdefghi", "'b' leaves a gap"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ],
)
def test_a_malformed_header_is_named(tmp_path: Path, header: object, data: bytes, message: str):
    path = with_header(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(InputError, match=message) as raised:
        files.read_header(path)
    assert "bad.safetensors" in str(raised.value)


def test_a_cut_file_is_called_truncated(file: Path):
    whole = file.read_bytes()
    for length in (0, 5, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is truncated"):
            files.read_header(file)
    file.write_bytes((10**9).to_bytes(8, "little") + whole)
    with pytest.raises(InputError, match="not a safetensors file"):
        files.read_header(file)


def test_a_file_cut_after_opening_is_called_truncated(file: Path):
    found, _ = files.read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="is truncated"):
        files.read(max(found.values(), key=lambda info: info.start + info.nbytes))


@pytest.mark.parametrize(
    ("produced", "message"),
    [
        ([("half", torch.zeros(2))], "announced as"),
        ([("other", torch.zeros(2))], "not announced"),
        ([("bytes", TENSORS["bytes"])] * 2, "produced twice"),
        ([], "nothing was produced"),
    ],
)
def test_a_failed_write_leaves_nothing_new(file: Path, produced: list[tuple[str, torch.Tensor]], message: str):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        files.write(file, LAYOUT, produced)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
