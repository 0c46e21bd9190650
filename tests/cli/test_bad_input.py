"""Bad input: one sentence, exit code 2, nothing written.

Every case changes one thing in a command that would otherwise run. Each is held to the same law: the command ends in
exit code 2 and says exactly one sentence, which names what is wrong and what would be right; the folder it runs in is
byte for byte as it was.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command import SMALL, Done, compress, layerwise, tree_of

from layerwise.engine.journal import Journal


@dataclass(frozen=True)
class Place:
    """Where a case runs: a folder of its own, the dense networks, the text."""

    folder: Path
    llama: Path
    bert: Path
    text: Path

    @property
    def out(self) -> Path:
        return self.folder / "OUT"

    def copy(self) -> Path:
        """A copy of the causal network, to be damaged."""
        return Path(shutil.copytree(self.llama, self.folder / "network"))

    def changed(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A copy whose tensors were changed."""
        copy = self.copy()
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, tiny_bert: Path, sentences: Path) -> Place:
    return Place(tmp_path, tiny_llama, tiny_bert, sentences)


def refused(place: Place, *words: str, run: Callable[[], Done]) -> str:
    """The sentence of a command that must be refused; ``words`` must all be in it."""
    before = tree_of(place.folder)
    folders = {p for p in place.folder.rglob("*") if p.is_dir()}
    done = run()
    assert done.code == 2, (done.out, done.err)
    assert len(done.sentences) == 1, done.err
    sentence = done.sentences[0]
    assert sentence.startswith("layerwise: ") and "Traceback" not in done.err
    for word in words:
        assert word in sentence, sentence
    assert tree_of(place.folder) == before
    assert {p for p in place.folder.rglob("*") if p.is_dir()} == folders
    return sentence


def refused_run(place: Place, model: Path | str, words: tuple[str, ...], *options: str | Path) -> str:
    given = options if any(o in ("--budget", "--uniform", "--quality-loss", "--plan") for o in options) else (
        "--budget", "5bpw", *options,
    )  # fmt: skip
    return refused(place, *words, run=lambda: compress(model, place.out, place.text, *given))


# ---------------------------------------------------------------- the network


def test_missing_directory(place: Place) -> None:
    refused_run(place, place.folder / "nowhere", ("there is no directory", "nowhere"))


def test_empty_directory(place: Place) -> None:
    (place.folder / "empty").mkdir()
    refused_run(place, place.folder / "empty", ("is an empty directory", "config.json"))


def test_a_file_instead_of_a_directory(place: Place) -> None:
    refused_run(place, place.llama / "model.safetensors", ("is a file", "give the checkpoint's directory"))


def test_no_config(place: Place) -> None:
    copy = place.copy()
    (copy / "config.json").unlink()
    refused_run(place, copy, ("has no config.json",))


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), ("[]", "JSON object"), ("{}", "architecture")])
def test_a_config_that_describes_nothing(place: Place, content: str, words: str) -> None:
    copy = place.copy()
    (copy / "config.json").write_text(content)
    refused_run(place, copy, (words,))


def test_an_unknown_architecture(place: Place) -> None:
    copy = place.copy()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["LamaForCausalLM"]}))
    refused_run(place, copy, ("LamaForCausalLM", "did you mean", "LlamaForCausalLM"))


def test_a_pickle_is_refused_with_the_command_that_converts_it(place: Place) -> None:
    copy = place.copy()
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    sentence = refused_run(place, copy, ("pickled", "python -c"))
    code = sentence.split('python -c "')[1].rsplit('"', 1)[0]
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    assert load_file(copy / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(place: Place, share: float) -> None:
    copy = place.copy()
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused_run(place, copy, ("model.safetensors is truncated",))


def test_a_corrupted_header(place: Place) -> None:
    copy = place.copy()
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:24] = b'"}}{'
    file.write_bytes(content)
    refused_run(place, copy, ("model.safetensors",))


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite_name_the_tensor(place: Place, value: float, kind: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    copy = place.changed(lambda tensors: tensors[name].view(-1)[77].fill_(value))
    refused_run(place, copy, (name, kind, "finite"))


def test_missing_tensors(place: Place) -> None:
    copy = place.changed(lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    refused_run(place, copy, ("no tensor for model.layers.0.self_attn.q_proj.weight", "LlamaForCausalLM"))


def test_a_tensor_of_another_shape(place: Place) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    copy = place.changed(lambda tensors: tensors.update({name: tensors[name][:32].clone()}))
    refused_run(place, copy, (name, "[32, 64]", "[64, 64]"))


def test_weights_beyond_the_type_they_are_stored_in(place: Place) -> None:
    """A norm of 1e6 is finite in float32 and not in float16; it must be found before the passes."""
    copy = place.changed(lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    refused_run(place, copy, ("model.norm.weight", "float16", "bfloat16"))


def test_no_tokenizer(place: Place) -> None:
    copy = place.copy()
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused_run(place, copy, ("has no tokenizer", "tokenizer.json"))


def test_what_another_tool_has_quantized_may_be_beyond_us(place: Place) -> None:
    copy = place.copy()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    refused_run(place, copy, ("quantized already (bitsandbytes)", "start from the dense checkpoint"))


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("1bpw", ("below the smallest", "bytes", "bpw")),
        ("100B", ("a budget of 100B", "below the smallest")),
        ("10MB", ("above the network's own size",)),
        ("-5MB", ("more than zero",)),
        ("-4bpw", ("more than zero",)),
        ("0%", ("more than zero",)),
        ("101%", ("larger than the input",)),
        ("four", ("not a size", "4.5bpw")),
        ("nanMB", ("not a finite number",)),
        ("", ("--budget",)),
        ("4", ("no unit",)),
        ("12Mb", ("unknown unit",)),
        ("5ms", ("latency budget", "not supported yet")),
        ("latency:5ms", ("latency budget", "not supported yet")),
        ("kl:0.1", ("--quality-loss kl:0.1",)),
    ],
)  # fmt: skip
def test_budgets(place: Place, budget: str, words: tuple[str, ...]) -> None:
    refused_run(place, place.llama, words, "--budget", budget)


def test_the_smallest_feasible_budget_it_names_is_feasible(place: Place) -> None:
    sentence = refused_run(place, place.llama, ("below the smallest",), "--budget", "1bpw")
    smallest = int(sentence.split("can make: ")[1].split(" bytes")[0].replace(",", ""))
    done = compress(place.llama, place.out, place.text, "--budget", f"{smallest}B", "--dry-run", "--json")
    assert done.code == 0 and done.json["smallest"] == smallest
    refused_run(place, place.llama, ("below the smallest",), "--budget", f"{smallest - 1}B")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--techniques", "gptk"), ("gptk", "did you mean gptq")),
        (("--techniques", "rtn,two-sded"), ("two_sded", "two_sided")),
        (("--techniques", "gptq:bitz=3"), ("no option 'bitz'", "bits")),
        (("--techniques", "gptq:bits=three"), ("'bits' of gptq", "whole number")),
        (("--techniques", "gptq:bits=99"), ("'bits' of gptq", "from", "99")),
        (("--techniques", "gptq:bits"), ("bits=VALUE",)),
        (("--techniques", "gptq+rtn"), ("gptq",)),
        (("--uniform", "gptk:bits=3"), ("gptk", "did you mean gptq")),
        (("--uniform", ""), ("--uniform",)),
        (("--uniform", "gptq:bits=4", "--embeddings", "int4"), ("--embeddings", "same or int8")),
        (("--budget", "5bpw", "--uniform", "gptq:bits=4"), ("only one of --budget and --uniform",)),
        (("--budget", "5bpw", "--quality-loss", "1%"), ("only one of --budget and --quality-loss",)),
        (("--fix", "model.layers.0.mlp.up_prj=rtn:bits=4"), ("model.layers.0.mlp.up_prj", "did you mean")),
        (("--fix", "model.layers.0.mlp.up_proj"), ("SITE=RECIPE",)),
        (("--fix", "model.layers.0.mlp.up_proj=rtm:bits=4"), ("rtm", "did you mean rtn")),
        (("--redo", "model.layers.9.mlp.up_proj=rtn:bits=4"), ("model.layers.9.mlp.up_proj", "did you mean")),
        (("--keep", "nothing_like_it"), ("--keep", "matches no site")),
        (("--keep", "("), ("--keep", "not a regular expression")),
        (("--device", "tpu9"), ("no device 'tpu9'", "cpu")),
        (("--device", "cuda:99"), ("no device 'cuda:99'", "cpu")),
        (("--dtype", "float8"), ("--dtype", "float16")),
        (("--pooling", "cls"), ("--pooling is for bare encoders",)),
        (("--length", "4"), ("--length", "from 8")),
        (("--length", "99999999"), ("--length",)),
        (("--sequences", "0"), ("--sequences", "from 4")),
        (("--sequences", "8"), ("--sequences 40", "--length 32")),
        (("--sequences", "many"), ("--sequences", "integer")),
        (("--workers", "0"), ("--workers", "from 1")),
        (("--quality-loss", "distance:0.1"), ("LlamaForCausalLM", "kl:")),
        (("--quality-loss", "1"), ("wrong unit", "1%")),
        (("--quality-loss", "nan%"), ("not a finite number",)),
        (("--bugdet", "4bpw"), ("--bugdet", "--budget")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_options(place: Place, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused_run(place, place.llama, words, *options)


@pytest.mark.parametrize(
    ("asked", "words"), [("1%", ("perplexity", "BertModel", "distance:")), ("kl:0.1", ("distance:",))]
)
def test_quality_loss_that_an_encoder_does_not_have(place: Place, asked: str, words: tuple[str, ...]) -> None:
    refused_run(place, place.bert, words, "--quality-loss", asked)


def test_nothing_asked_for(place: Place) -> None:
    refused(place, "--budget", "--quality-loss", run=lambda: compress(place.llama, place.out, place.text))


@pytest.mark.parametrize(("arguments", "word"), [(("compres",), "compress"), (("compress",), "MODEL")])
def test_commands_that_do_not_exist_or_lack_something(place: Place, arguments: tuple[str, ...], word: str) -> None:
    refused(place, word, "--help", run=lambda: layerwise(*arguments))


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ("is empty",)),
        ("blank.txt", b"\n \n\t\n", ("is empty",)),
        ("short.txt", b"One line is not enough.\n", ("too short",)),
        ("latin.txt", "Stra\xdfe und Gr\xfc\xdfe\n".encode("latin-1") * 50, ("not UTF-8", "byte 4", "convert")),
        ("binary.txt", bytes(range(256)) * 8, ("not UTF-8",)),
        ("lines.jsonl", b'{"text": "fine"}\nbroken\n', ("line 2", "JSON")),
        ("numbers.csv", b"1,2\n3,4\n", ("no column of text",)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_calibration_text(place: Place, name: str, content: bytes, words: tuple[str, ...]) -> None:
    text = place.write(name, content)
    refused(place, name, *words, run=lambda: compress(place.llama, place.out, text, "--budget", "5bpw"))


def test_text_that_does_not_exist(place: Place) -> None:
    refused(place, "nowhere.txt", run=lambda: compress(place.llama, place.out, Path("nowhere.txt"), "--budget", "5bpw"))
    refused(place, "org/no-such", run=lambda: compress(place.llama, place.out, Path("org/no-such"), "--budget", "5bpw"))


def test_a_column_that_does_not_exist(place: Place) -> None:
    text = place.write("t.csv", "sentence,score\n" + "a b c d e,1\n" * 40)
    refused(
        place, "no column 'sentense'", "did you mean sentence",
        run=lambda: compress(place.llama, place.out, text, "--budget", "5bpw", "--text-column", "sentense"),
    )  # fmt: skip


def test_evaluation_lines_that_are_in_the_calibration_text(place: Place) -> None:
    lines = place.text.read_text().splitlines()
    held_out = place.write("held.txt", "\n".join([*(f"Another line, number {i}." for i in range(60)), *lines[:9]]))
    refused_run(place, place.llama, ("evaluation lines", "calibration"), "--evaluate", held_out)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "is empty"), (b"Too short.\n", "too short"), (b"\xff\xfe", "UTF-8")]
)
def test_evaluation_text(place: Place, content: bytes, word: str) -> None:
    refused_run(place, place.llama, (word, "held.txt"), "--evaluate", place.write("held.txt", content))


# ---------------------------------------------------------------- places


def test_out_exists(place: Place) -> None:
    place.out.mkdir()
    refused_run(place, place.llama, ("OUT exists", "--force"))


def test_force_replaces_only_what_looks_like_a_network(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("years of work")
    refused_run(place, place.llama, ("does not look like a network",), "--budget", "5bpw", "--force")


def test_out_in_a_folder_that_does_not_exist(place: Place) -> None:
    refused(
        place, "does not exist", "nowhere",
        run=lambda: compress(place.llama, place.folder / "nowhere" / "OUT", place.text, "--budget", "5bpw"),
    )  # fmt: skip


def test_the_work_folder_of_another_run(place: Place) -> None:
    work = place.folder / "work"
    Journal(work, "0" * 64).close()
    refused_run(place, place.llama, ("belongs to another run", "--work"), "--work", work)


def test_a_work_folder_that_holds_something_else(place: Place) -> None:
    work = place.folder / "work"
    work.mkdir()
    (work / "letters.txt").write_text("keep")
    refused_run(place, place.llama, ("holds files that are not layerwise's",), "--work", work)
    refused_run(place, place.llama, ("is a file",), "--work", work / "letters.txt")


def test_a_disk_that_is_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    refused_run(place, place.llama, ("disk", "MB", "--work"))


# ---------------------------------------------------------------- plans


def test_plans_that_cannot_be_applied(place: Place, finished_plan: Path) -> None:
    plan = json.loads(finished_plan.read_text())
    site = "model.layers.1.mlp.up_proj"

    def edited(name: str, change: Callable[[dict], object]) -> Path:  # type: ignore[type-arg]
        value = json.loads(json.dumps(plan))
        change(value)
        return place.write(name, json.dumps(value))

    renamed = edited("renamed.json", lambda p: p["sites"].update({"model.layers.1.mlp.upproj": p["sites"].pop(site)}))
    refused_run(place, place.llama, ("model.layers.1.mlp.upproj", f"did you mean {site}"), "--plan", renamed)
    removed = edited("removed.json", lambda p: p["sites"].pop(site))
    refused_run(place, place.llama, ("leaves out", site), "--plan", removed)
    misspelt = edited("misspelt.json", lambda p: p["sites"][site].update(recipe="gptk:bits=3"))
    refused_run(place, place.llama, ("gptk", "did you mean gptq"), "--plan", misspelt)
    untried = edited("untried.json", lambda p: p["sites"][site].update(recipe="rtn:bits=7,group=16"))
    refused_run(place, place.llama, ("do not try", f"--redo {site}=rtn:bits=7,group=16"), "--plan", untried)
    later = edited("later.json", lambda p: p.update(version=99))
    refused_run(place, place.llama, ("version 99",), "--plan", later)
    refused_run(place, place.llama, ("not valid JSON",), "--plan", place.write("broken.json", "{"))
    refused_run(place, place.llama, ("nowhere.json",), "--plan", place.folder / "nowhere.json")


def test_the_other_verbs(place: Place, finished_plan: Path) -> None:
    """The verbs that read results refuse as ``compress`` does."""
    missing, out = place.folder / "nowhere", finished_plan.parent
    for arguments, words in (
        (("inspect", missing), ("nowhere",)),
        (("export", missing, place.out), ("nowhere",)),
        (("export", out, place.out, "--to", "denes"), ("denes", "dense")),
        (("export", out, place.folder), ("exists", "--force")),
        (("report", missing), ("nowhere",)),
        (("evaluate", missing, "--dense", place.llama, "--evaluate", place.text), ("nowhere",)),
        (("evaluate", out, "--dense", missing, "--evaluate", place.text), ("nowhere",)),
        (("evaluate", out, "--dense", place.bert, "--evaluate", place.text), ("BertModel",)),
        (("evaluate", out, "--dense", place.llama, "--evaluate", place.folder / "no.txt"), ("no.txt",)),
        (("plan", "show", missing), ("nowhere",)),
        (("plan", "diff", out, missing), ("nowhere",)),
        (("plan", place.llama, "--budget", "5"), ("--work",)),
        (("calibrate", place.llama, "--work", place.folder / "w", "--calibrate", "no.txt"), ("no.txt",)),
    ):
        refused(place, *words, run=lambda a=arguments: layerwise(*a))  # type: ignore[misc]


# ---------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("nowhere.dir/x", "OUT", "--budget", "4bpw"), "nowhere.dir/x"),
        (("NET", "OUT", "--budget", "1bpw"), "below the smallest"),
        (("NET", "OUT", "--budget", "5bpw", "--calibrate", "empty.txt"), "is empty"),
    ],
    ids=["model", "budget", "text"],
)
def test_in_a_process_of_its_own(place: Place, options: tuple[str, ...], word: str) -> None:
    place.write("empty.txt", "")

    def run() -> Done:
        arguments = [str(place.llama) if o == "NET" else o for o in options]
        command = [sys.executable, "-m", "layerwise.cli.main", "compress", *arguments, *SMALL]
        done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    refused(place, word, run=run)
