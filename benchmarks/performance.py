"""How fast packed networks run here, beside other engines: writes ``docs/performance.md``.

    python benchmarks/performance.py [--rounds 5] [--batches 1,8,32,128] [--threads 2] [--out FILE]

Products first (``layerwise bench kernels``), then whole networks of random weights, which are as fast as trained ones:
an encoder of the size of all-MiniLM-L6-v2 and a LLaMA of 110 million weights. Every engine is an optional import; one
that is not installed is a row that says so. llama.cpp is given the LLaMA as ``layerwise export --to gguf`` writes it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.scales import Scales, groups_of
from layerwise.encoding.trellis import Trellis
from layerwise.encoding.trellis_tables import UNIT
from layerwise.generate.network import causal_network
from layerwise.generate.wanted import Wanted, silent
from layerwise.kernels.measure import PeerRow, Report, Row, measure
from layerwise.network.fused_blocks import use_fused_blocks
from layerwise.network.packed import PackedEmbedding, PackedHead, PackedLinear, set_activations
from layerwise.network.short_attention import use_short_attention
from layerwise.recipe import parse_generator, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
SENTENCES, WORDS = 16, 32
PROMPT, NEW_TOKENS = 16, 32
VOCABULARY = 32000
TRELLIS = "random trellis of bits="  # in place of a recipe
SETTLED = 0.02  # seconds: threads of the engine before spin for some time, on the cores that the next one needs

FAST = (
    "*int8 activations*, *its own attention* and *fused blocks* are choices of the user: "
    "[Compress an encoder](compress-an-encoder.md#run-it-fast)."
)
DECODED = (
    "layerwise generates as `layerwise generate` does, a token by one call of the library; where *blocks run by "
    "transformers* is said, the packed network runs in transformers' own loop, as the dense ones do, with *fused "
    "blocks* or without. int8 activations are a choice of the user: [Generate text](generate.md#speed)."
)

Timed = dict[str, float | str]
"""Name -> how many a second, or why there is no figure."""


# ---------------------------------------------------------------- packing a network in memory


def packed(network: nn.Module, recipe: str, activations: str) -> nn.Module:
    """``network`` with every linear packed by ``recipe``, and with it the table of a tied head; in place."""
    head = getattr(network, "lm_head", None)
    table = network.get_input_embeddings() if head is not None else None  # type: ignore[operator]
    for name, module in list(network.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear) and module is not head:
            form = _encode(module.weight, recipe)
            setattr(
                network.get_submodule(parent),
                own,
                PackedLinear(form.spec(), form.tensors(), module.bias, torch.float32),
            )
    if table is not None:
        form = _encode(table.weight, recipe)
        shared = PackedEmbedding(form.spec(), form.tensors(), torch.float32)
        network.set_input_embeddings(shared)  # type: ignore[operator]
        network.lm_head = PackedHead(shared, None)  # type: ignore[assignment]
    set_activations(network, activations)
    return network


def _encode(weight: Tensor, recipe: str) -> Encoded:
    if recipe.startswith(TRELLIS):
        return drawn_trellis(weight, int(recipe.removeprefix(TRELLIS)))
    encoder = parse_recipe(recipe).encoder
    return encoder.encode(weight.detach().float(), SiteStatistics.uninformed(*weight.shape))  # type: ignore[attr-defined, no-any-return]


def drawn_trellis(weight: Tensor, bits: int, group: int = 128) -> Trellis:
    """A trellis of random codes, whose values are as large as ``weight``'s."""
    rows, columns = weight.shape
    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=g)
    scale = float(weight.detach().float().std()) * UNIT[bits]
    return Trellis.from_codes(codes, bits, group, Scales.of(torch.full((rows, groups_of(group, columns)), scale), 16))


# ---------------------------------------------------------------- an encoder


def encoder_speed(rounds: int, paused: Callable[[], None]) -> Timed:
    """Sentences a second of an encoder of MiniLM's size, ``SENTENCES`` at a time, ``WORDS`` tokens each."""
    from transformers import BertConfig, BertModel

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        return BertModel(BertConfig(**sizes)).eval()

    ids = torch.randint(0, 30000, (SENTENCES, WORDS), generator=torch.Generator().manual_seed(0))
    dense = fresh()
    halved = fresh().bfloat16()
    eight = packed(fresh(), "rtn:bits=8,group=128", "int8")
    four = packed(fresh(), "rtn:bits=4,group=128", "int8")
    eight_short, four_short = copy.deepcopy(eight), copy.deepcopy(four)
    use_short_attention(eight_short)
    use_short_attention(four_short)
    eight_fused, four_fused = copy.deepcopy(eight_short), copy.deepcopy(four_short)
    use_fused_blocks(eight_fused)
    use_fused_blocks(four_fused)
    runs: dict[str, Callable[[], object] | str] = {
        "transformers, float32": lambda: dense(ids),
        "transformers, bfloat16": lambda: halved(ids),
        "layerwise, 8 bits, int8 activations": lambda: eight(ids),
        "layerwise, 4 bits, int8 activations": lambda: four(ids),
        "layerwise, 8 bits, int8 activations, its own attention": lambda: eight_short(ids),
        "layerwise, 4 bits, int8 activations, its own attention": lambda: four_short(ids),
        "layerwise, 8 bits, int8 activations, fused blocks": lambda: eight_fused(ids),
        "layerwise, 4 bits, int8 activations, fused blocks": lambda: four_fused(ids),
        "ONNX Runtime, dynamic int8": _onnx_encoder(fresh(), ids),
        "OpenVINO, int8 weights": _openvino_encoder(fresh(), ids),
        "OpenVINO, int8 weights and activations, quantized by ONNX Runtime": _openvino_static(fresh(), ids),
    }
    return _per_second(runs, SENTENCES, rounds, paused)


class _Traceable(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids).last_hidden_state  # type: ignore[no-any-return]


def _onnx_encoder(network: nn.Module, ids: Tensor) -> Callable[[], object] | str:
    for needed in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "exact.onnx", Path(folder) / "int8.onnx"
        try:
            _export(network, ids, exact)
            quantize_dynamic(str(exact), str(rounded), weight_type=QuantType.QInt8)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(str(rounded), options, providers=["CPUExecutionProvider"])
        except Exception as broken:
            return f"the network could not be exported: {str(broken).splitlines()[0][:80]}"
    fed = {session.get_inputs()[0].name: ids.numpy()}
    return lambda: session.run(None, fed)


def _export(network: nn.Module, ids: Tensor, to: Path) -> None:
    torch.onnx.export(_Traceable(network), (ids,), str(to), input_names=["ids"], dynamo=False)


def _openvino_static(network: nn.Module, ids: Tensor) -> Callable[[], object] | str:
    """Both int8: ONNX Runtime's static quantizer, which OpenVINO reads, in the place of its own."""
    for needed in ("onnx", "onnxruntime", "openvino"):
        if importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    import openvino
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        left = 1

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            return {"ids": ids.numpy()} if self.left >= 0 else None

    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = Path(folder) / "exact.onnx", Path(folder) / "int8.onnx"
        try:
            _export(network, ids, exact)
            quantize_static(
                str(exact), str(rounded), Once(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
            )  # fmt: skip
            model = openvino.Core().read_model(str(rounded))
            settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
            request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        except Exception as broken:
            return f"the network could not be quantized: {str(broken).splitlines()[0][:80]}"
    return lambda: request.infer({0: ids.numpy()})


def _openvino_encoder(network: nn.Module, ids: Tensor) -> Callable[[], object] | str:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    if importlib.util.find_spec("nncf") is None:
        return "nncf, by which OpenVINO quantizes, is not installed"
    import nncf
    import openvino

    model = nncf.compress_weights(openvino.convert_model(_Traceable(network), example_input=ids))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: ids.numpy()})


# ---------------------------------------------------------------- a decoder


def llama() -> Any:
    """A LLaMA of 110 million random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=True, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def decoder_speed(rounds: int, paused: Callable[[], None]) -> Timed:
    """New tokens a second of ``llama()``, one sequence, greedy, with a key-value cache."""
    prompt = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    networks = {
        "transformers, float32": llama(),
        "transformers, bfloat16": llama().bfloat16(),
        "layerwise, 8 bits, int8 activations": packed(llama(), "rtn:bits=8,group=128", "int8"),
        "layerwise, 4 bits, int8 activations": packed(llama(), "rtn:bits=4,group=128", "int8"),
        "layerwise, 4 bits, float activations": packed(llama(), "rtn:bits=4,group=128", "exact"),
    }
    for bits in (4, 3, 2):
        networks[f"layerwise, trellis of {bits} bits, int8 activations"] = packed(llama(), f"{TRELLIS}{bits}", "int8")
    runs: dict[str, Callable[[], object] | str] = {}
    for name, network in networks.items():
        runs[name] = _generating(network, prompt) if name.startswith("layerwise") else _decoding(network, prompt)
    own = "layerwise, 4 bits, int8 activations"
    fused = copy.deepcopy(networks[own])
    use_fused_blocks(fused)
    runs[f"{own}, blocks run by transformers"] = _decoding(networks[own], prompt)
    runs[f"{own}, blocks run by transformers, fused blocks"] = _decoding(fused, prompt)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        runs["llama.cpp, Q4_0"] = _llama_cpp(Path(folder), prompt)
        return _per_second(runs, NEW_TOKENS, rounds, paused)


def _generating(network: Any, prompt: Tensor) -> Callable[[], object]:
    """``layerwise generate``: the blocks by the compiled library."""
    speaker, plain = causal_network(network), parse_generator("plain")
    wanted, tokens = Wanted(NEW_TOKENS, ignore_stop=True), [prompt[0].tolist()]
    return lambda: plain.generate(speaker, tokens, wanted, silent)


def _decoding(network: Any, prompt: Tensor) -> Callable[[], object]:
    def run() -> object:
        given, cache, last = prompt, None, None
        for _ in range(NEW_TOKENS):
            out = network(input_ids=given, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            given = last
        return last

    return run


def gguf_of_llama(folder: Path) -> Path:
    """``llama()`` at 4 bits as llama.cpp reads it, by the commands of a user; the tokenizer is of no account here."""
    llama().half().save_pretrained(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "docs-lm" / name, folder / "llama")
    small, file = folder / "small", folder / "small.gguf"
    asked = ["--uniform", "rtn:bits=4,group=32,symmetric=true", "--sequences", "20", "--length", "64", "--no-baseline"]
    for verb in (
        ["compress", str(folder / "llama"), str(small), *asked],
        ["export", str(small), str(file), "--to", "gguf", "--reencode"],
    ):
        ended = subprocess.run([sys.executable, "-m", "layerwise.cli.main", *verb], capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"layerwise {verb[0]} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return file


def _llama_cpp(folder: Path, prompt: Tensor) -> Callable[[], object] | str:
    for module, name in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(gguf_of_llama(folder)), n_threads=threads, n_threads_batch=threads, n_ctx=256, verbose=False
    )
    first = [token % model.n_vocab() for token in prompt[0].tolist()]

    def run() -> object:
        model.reset()
        model.eval(first)
        for _ in range(NEW_TOKENS - 1):
            model.eval([7])  # which token it is costs nothing
        return None

    return run


def _per_second(
    runs: dict[str, Callable[[], object] | str], count: int, rounds: int, paused: Callable[[], None]
) -> Timed:
    times: dict[str, list[float]] = {name: [] for name, run in runs.items() if not isinstance(run, str)}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in times:
                paused()
                time.sleep(SETTLED)
                runs[name]()  # type: ignore[operator]
                began = time.perf_counter()
                runs[name]()  # type: ignore[operator]
                times[name] += [time.perf_counter() - began] if turn else []
    return {name: run if isinstance(run, str) else count / statistics.median(times[name]) for name, run in runs.items()}


# ---------------------------------------------------------------- the page


def page(report: Report, networks: dict[str, Timed]) -> str:
    """``docs/performance.md``."""
    cache = "unknown" if report.cache_bytes is None else f"{report.cache_bytes / 2**20:.0f} MiB"
    said = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        "# Speed",
        "",
        "Written by `benchmarks/performance.py` (`make bench`); figures are of one machine at one time.",
        "",
        f"- {datetime.date.today().isoformat()}, {report.processor}, {report.threads} threads, path {report.path}, "
        f"last cache {cache}, Python {platform.python_version()}",
        f"- {said}",
        f"- Products from memory: sets of more than {report.set_bytes / 1e6:.0f} MB of weights, medians of interleaved "
        "rounds. *Of reading* is packed bytes over time, over the bandwidth of only reading the same bytes with the "
        "same threads in the same rounds; *of dots* is dot products over those of a loop that does nothing else (the "
        "limit of large batches; exact activations take three for every product, bfloat16 ones two). Ratios to other "
        "engines stand where both were timed in the same rounds; above 1 means that layerwise is faster.",
        "",
        "## Products",
    ]
    for batch in dict.fromkeys(row.batch for row in report.rows):
        lines += ["", f"### {batch} token{'s' if batch > 1 else ''}", *_products(report, batch)]
    lines += ["", "## Other engines, median µs", *_peers(report)]
    for title, timed in networks.items():
        lines += ["", f"## {title}", "", "| engine | a second |", "|---|--:|"]
        lines += [f"| {name} | {v if isinstance(v, str) else f'{v:.1f}'} |" for name, v in timed.items()]
        if any("fused blocks" in name for name in timed):
            lines += ["", DECODED if any("llama.cpp" in name for name in timed) else FAST]
    return "\n".join(lines) + "\n"


def _products(report: Report, batch: int) -> list[str]:
    names = list(dict.fromkeys(peer.name for peer in report.peers if peer.microseconds))
    heads = ["form", "activations", "matrix", "median µs", "of reading", "of dots", "torch fp32 ×", "torch bf16 ×"]
    heads += [f"{name} ×" for name in names]
    lines = ["", "| " + " | ".join(heads) + " |", "|---|---|---|" + "--:|" * (len(heads) - 3)]
    return lines + [_line(report, row, names) for row in report.rows if row.batch == batch]


def _line(report: Report, row: Row, names: list[str]) -> str:
    over = report.over_peers(row)
    cells = [row.form, row.activations, f"{row.rows} × {row.columns}", f"{row.microseconds:.0f}", f"{row.share:.0%}"]
    cells += [f"{row.of_dots:.0%}" if row.of_dots else ""]
    cells += [f"{row.over_fp32:.2f}", f"{row.over_bf16:.2f}"]
    cells += [f"{over[name]:.2f}" if name in over else "" for name in names]
    return "| " + " | ".join(cells) + " |"


def _peers(report: Report) -> list[str]:
    batches = list(dict.fromkeys(peer.batch for peer in report.peers))
    lines = ["", "| engine | activations | matrix | " + " | ".join(f"{b} tokens" for b in batches) + " |"]
    lines += ["|---|---|---|" + "--:|" * len(batches)]
    for name, kind, rows, columns in dict.fromkeys((p.name, p.activations, p.rows, p.columns) for p in report.peers):
        own = {p.batch: p for p in report.peers if (p.name, p.rows, p.columns) == (name, rows, columns)}
        cells = [_peer_cell(own.get(batch)) for batch in batches]
        lines += [f"| {name} | {kind} | {rows} × {columns} | " + " | ".join(cells) + " |"]
    return lines


def _peer_cell(peer: PeerRow | None) -> str:
    if peer is None:
        return ""
    return peer.absent if peer.microseconds is None else f"{peer.microseconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = tuple(int(batch) for batch in options.batches.split(","))
    write(options.out, options.rounds, batches)
    print(f"wrote {options.out}")


def write(out: Path, rounds: int, batches: tuple[int, ...], paused: Callable[[], None] = lambda: None) -> None:
    """Measure everything and write the page. ``paused`` is called between what is timed."""
    report = measure(batches=batches, rounds=rounds, shown=lambda text: print(text, flush=True))
    networks = {
        f"An encoder of MiniLM's size, {SENTENCES} sentences of {WORDS} tokens": encoder_speed(rounds, paused),
        "A LLaMA of 110 million weights, one sequence": decoder_speed(rounds, paused),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(report, networks), encoding="utf-8")


if __name__ == "__main__":
    main()
