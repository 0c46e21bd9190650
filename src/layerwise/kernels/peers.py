"""Products of the same shape by other engines, for the benchmark: each an optional import, none of them needed.

A peer is given a shape and a number of copies, and answers with a product of one of them; its weights are random, as
ours are, and packed by the engine itself. What cannot run here is a row that says why.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 128
Product = Callable[[int, Tensor], object]
"""The product of the i-th copy with ``x`` float32 [tokens, columns]."""


class Absent(Exception):
    """A peer that cannot run here; the message is why."""


@dataclass(frozen=True)
class Peer:
    """An engine's product. ``bits``: of its weights. ``make(rows, columns, copies)`` packs the weights."""

    name: str
    bits: int
    activations: str
    make: Callable[[int, int, int], Product]

    def bytes(self, rows: int, columns: int) -> int:
        """Of one matrix's codes, without scales: how many copies a set from memory needs."""
        return rows * columns * self.bits // 8


def torch_int4(rows: int, columns: int, copies: int) -> Product:
    """``_weight_int4pack_mm_for_cpu``, bfloat16 activations."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=_generator())
    scales = torch.rand(columns // GROUP, rows, 2, generator=_generator()).bfloat16()
    try:
        packed = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(copies)]
    except (RuntimeError, AttributeError) as broken:
        raise Absent(f"this torch has no such product ({_first_line(broken)})") from None
    halves = _Halves()
    return lambda i, x: torch._weight_int4pack_mm_for_cpu(halves(x), packed[i], GROUP, scales)


def torch_int8(rows: int, columns: int, copies: int) -> Product:
    """``quantized.linear_dynamic``: int8 weights of one scale, activations rounded to uint8 at each call."""
    weight = torch.quantize_per_tensor(torch.randn(rows, columns, generator=_generator()), 0.02, 0, torch.qint8)
    try:
        packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(copies)]
    except RuntimeError as broken:
        raise Absent(f"this torch has no such product ({_first_line(broken)})") from None
    return lambda i, x: torch.ops.quantized.linear_dynamic(x, packed[i])


def onnx_int4(rows: int, columns: int, copies: int) -> Product:
    """ONNX Runtime's ``MatMulNBits`` at accuracy level 4: activations rounded to int8."""
    onnx, numpy, helper = _onnx()
    groups = columns // GROUP
    codes = numpy.random.default_rng(0).integers(0, 256, (rows, groups, GROUP // 2), dtype=numpy.uint8)
    scales = numpy.random.default_rng(1).random(rows * groups, dtype=numpy.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    held = {"codes": codes, "scales": scales}
    return _onnx_product(onnx, helper, [node], held, rows, columns, copies)


def onnx_int8(rows: int, columns: int, copies: int) -> Product:
    """ONNX Runtime's dynamic int8: ``DynamicQuantizeLinear`` and ``MatMulInteger``, as its quantizer writes them."""
    onnx, numpy, helper = _onnx()
    codes = numpy.random.default_rng(0).integers(-127, 128, (columns, rows), dtype=numpy.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "codes", "z", "wz"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["float"], to=1),
        helper.make_node("Mul", ["s", "scale"], ["both"]),
        helper.make_node("Mul", ["float", "both"], ["y"]),
    ]
    held = {"codes": codes, "wz": numpy.array(0, numpy.int8), "scale": numpy.array(0.02, numpy.float32)}
    return _onnx_product(onnx, helper, nodes, held, rows, columns, copies)


def openvino_int4(rows: int, columns: int, copies: int) -> Product:
    """OpenVINO's compressed weights: u4 codes with fp16 scales and whole zeros, as its own exporter writes them."""
    return _openvino(rows, columns, copies, 4)


def openvino_int8(rows: int, columns: int, copies: int) -> Product:
    """The same at 8 bits."""
    return _openvino(rows, columns, copies, 8)


def ggml_q4_0(rows: int, columns: int, copies: int) -> Product:
    """ggml's ``mul_mat`` with Q4_0 (18 bytes for 32 weights), through the library inside llama-cpp-python."""
    return _ggml(rows, columns, copies, kind=2, block_bytes=18, block=32)


def ggml_q8_0(rows: int, columns: int, copies: int) -> Product:
    """The same with Q8_0 (34 bytes for 32 weights)."""
    return _ggml(rows, columns, copies, kind=8, block_bytes=34, block=32)


PEERS = (
    Peer("torch int4", 4, "bf16", torch_int4),
    Peer("torch int8 dynamic", 8, "int8", torch_int8),
    Peer("ONNX Runtime int4", 4, "int8", onnx_int4),
    Peer("ONNX Runtime int8", 8, "int8", onnx_int8),
    Peer("OpenVINO int4", 4, "its choice", openvino_int4),
    Peer("OpenVINO int8", 8, "its choice", openvino_int8),
    Peer("ggml Q4_0", 4, "int8", ggml_q4_0),
    Peer("ggml Q8_0", 8, "int8", ggml_q8_0),
)


def versions() -> dict[str, str]:
    """Of the packages that peers come from, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnxruntime", "openvino", "torchao", "llama-cpp-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class _Halves:
    """The bfloat16 copy of the activations, made once: what a network that computes in it would hand over."""

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.made = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.of is not x:
            self.of, self.made = x, x.bfloat16()
        return self.made


def _onnx() -> tuple[Any, Any, Any]:
    _needed("onnxruntime")
    _needed("onnx")
    import numpy
    import onnx
    from onnx import helper

    return onnx, numpy, helper


def _onnx_product(
    onnx: Any, helper: Any, nodes: list[Any], held: dict[str, Any], rows: int, columns: int, copies: int
) -> Product:
    import onnxruntime

    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info("x", 1, ["tokens", columns])],
        [helper.make_tensor_value_info("y", 1, ["tokens", rows])],
        [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else its threads wait on our cores
    try:
        sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(copies)
        ]
    except Exception as broken:
        raise Absent(f"it refuses the product ({_first_line(broken)})") from None
    return lambda i, x: sessions[i].run(None, {"x": x.numpy()})


def _openvino(rows: int, columns: int, copies: int, bits: int) -> Product:
    _needed("openvino")
    import numpy
    import openvino
    from openvino import opset13 as ops

    groups, g = columns // GROUP, numpy.random.default_rng(0)
    kind = openvino.Type.u4 if bits == 4 else openvino.Type.u8
    top = 2**bits
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    drawn, drawn_zeros = g.integers(0, top, rows * columns), g.integers(0, top, rows * groups)
    requests = []
    for _ in range(copies):  # the engine repacks its constants, so that every copy has memory of its own
        codes = openvino.op.Constant(kind, openvino.Shape([rows, groups, GROUP]), drawn)
        zeros = openvino.op.Constant(kind, openvino.Shape([rows, groups, 1]), drawn_zeros)
        centred = ops.subtract(ops.convert(codes, "f16"), ops.convert(zeros, "f16"))
        scaled = ops.multiply(centred, ops.constant(g.random((rows, groups, 1)).astype(numpy.float16)))
        weight = ops.convert(ops.reshape(scaled, [rows, columns], False), "f32")
        x = ops.parameter([-1, columns], numpy.float32)
        model = openvino.Model([ops.matmul(x, weight, False, True)], [x])
        requests.append(core.compile_model(model, "CPU", settings).create_infer_request())
    return lambda i, x: requests[i].infer({0: x.numpy()}, share_inputs=True)


class _GgmlParameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _ggml(rows: int, columns: int, copies: int, kind: int, block_bytes: int, block: int) -> Product:
    _needed("llama_cpp", "llama-cpp-python")
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(str(spec.origin if spec else "")).parent / "lib"
    try:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(next(iter(sorted(folder.glob("libggml-cpu*.so"))))), mode=ctypes.RTLD_GLOBAL)
        pointer = ctypes.c_void_p
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
            getattr(base, name).restype = pointer
        base.ggml_init.argtypes = [_GgmlParameters]
        base.ggml_new_tensor_2d.argtypes = [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        base.ggml_mul_mat.argtypes = [pointer] * 3
        base.ggml_new_graph.argtypes = [pointer]
        base.ggml_get_data.argtypes = [pointer]
        base.ggml_build_forward_expand.argtypes = [pointer, pointer]
        base.ggml_free.argtypes = [pointer]
        cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    except (OSError, AttributeError, StopIteration) as broken:
        raise Absent(f"its library has another shape ({_first_line(broken)})") from None
    cpu.ggml_cpu_init()
    size = rows * columns // block * block_bytes
    weights = base.ggml_init(_GgmlParameters(copies * (size + 1024) + (1 << 20), None, False))
    held = [base.ggml_new_tensor_2d(weights, kind, columns, rows) for _ in range(copies)]
    data = torch.randint(0, 64, (size,), dtype=torch.uint8, generator=_generator())  # scales are finite halves
    for tensor in held:
        ctypes.memmove(base.ggml_get_data(tensor), data.data_ptr(), size)
    graphs: dict[int, tuple[int, list[int], list[int]]] = {}

    def product(i: int, x: Tensor) -> object:
        tokens = len(x)
        if tokens not in graphs:
            for context, _, _ in graphs.values():
                base.ggml_free(context)
            graphs.clear()
            context = base.ggml_init(_GgmlParameters(copies * (tokens * (rows + columns) * 8 + (1 << 20)), None, False))
            given, made = [], []
            for tensor in held:
                inputs = base.ggml_new_tensor_2d(context, 0, columns, tokens)
                graph = base.ggml_new_graph(context)
                base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, tensor, inputs))
                given.append(base.ggml_get_data(inputs))
                made.append(graph)
            graphs[tokens] = context, given, made
        context, given, made = graphs[tokens]
        ctypes.memmove(given[i], x.data_ptr(), x.numel() * 4)
        # The work memory of a call is taken from the context, so it is given a fresh one.
        room = base.ggml_init(_GgmlParameters(tokens * columns * 8 + (1 << 20), None, False))
        status = cpu.ggml_graph_compute_with_ctx(room, made[i], torch.get_num_threads())
        base.ggml_free(room)
        return status

    return product


def _needed(module: str, package: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{package or module} is not installed")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


Engine = tuple[Peer, int, Product | None, str]
"""A peer with its number of copies and its product, or None and why there is none."""


def prepared(rows: int, columns: int, set_bytes: int, peers: Sequence[Peer] = PEERS) -> Iterator[Engine]:
    """Each peer, ready to be timed on matrices of this shape."""
    for peer in peers:
        copies = 1 + set_bytes // peer.bytes(rows, columns)
        try:
            if columns % GROUP or rows % 64:
                raise Absent(f"measured at shapes of 64 rows and groups of {GROUP} columns only")
            yield peer, copies, peer.make(rows, columns, copies), ""
        except Absent as why:
            yield peer, copies, None, str(why)
