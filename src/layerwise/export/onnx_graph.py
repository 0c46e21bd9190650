"""A graph of ONNX, written node by node, its weights beside it in one file of external data.

Large tensors go straight to the data file, so that one is in memory at a time. Everything computes in float32; weights
are stored in the type that they are given in, and a ``Cast`` stands in the graph (engines fold it when they load).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.errors import InputError

OPSET = 21  # the first with blocks in DequantizeLinear
IR_VERSION = 10
CONTRIB = "com.microsoft"
ALIGNMENT = 64
INLINE_BYTES = 1024  # smaller tensors stay in the graph itself


def need_onnx() -> Any:
    """The package ``onnx``; raises ``InputError`` where it is not installed."""
    try:
        import onnx
        import onnx.helper
    except ImportError:
        raise InputError("the onnx export needs the package onnx; install layerwise[onnx]") from None
    return onnx


class Graph:
    """Nodes, inputs, outputs and weights; ``model`` makes the file's content."""

    def __init__(self, data: BinaryIO, data_name: str) -> None:
        self.onnx = need_onnx()
        self.data, self.data_name = data, data_name
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    # ------------------------------------------------------------ nodes

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.nodes_of(operator, inputs, 1, domain, **attributes)[0]

    def nodes_of(
        self, operator: str, inputs: Sequence[str], outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        self._count += 1
        names = [f"{operator}_{self._count}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        made = self.onnx.helper.make_node(operator, list(inputs), names, domain=domain, **attributes)
        self.nodes.append(made)
        return names

    def cast(self, value: str, dtype: str) -> str:
        return self.node("Cast", value, to=getattr(self.onnx.TensorProto, dtype))

    def floats(self, tensor: Tensor, name: str) -> str:
        """A stored tensor as float32: fp16 and bf16 stay what they are in the file."""
        stored = self.tensor(tensor, name)
        return stored if tensor.dtype == torch.float32 else self.cast(stored, "FLOAT")

    # ------------------------------------------------------------ weights

    def ints(self, *values: int) -> str:
        """A small vector of int64."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def constant(self, values: NDArray[Any]) -> str:
        """A small tensor in the graph itself, the same one once."""
        values = np.asarray(values, order="C")
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            kind = self.onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            self.weights.append(
                self.onnx.helper.make_tensor(self._constants[key], kind, values.shape, values.tobytes(), raw=True)
            )
        return self._constants[key]

    def tensor(self, tensor: Tensor, name: str, dtype: str | None = None) -> str:
        """A weight under its own name. ``dtype``: ``UINT4``, whose two values to a byte are packed here."""
        onnx = self.onnx
        kinds = {
            torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8",
            torch.int64: "INT64",
        }  # fmt: skip
        kind = getattr(onnx.TensorProto, dtype or kinds[tensor.dtype])
        flat = tensor.detach().contiguous().view(-1)
        if dtype == "UINT4":
            flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
            flat = flat[:, 0] | flat[:, 1] << 4
        content = flat.view(torch.uint8).numpy().tobytes()
        if len(content) <= INLINE_BYTES:
            self.weights.append(onnx.helper.make_tensor(name, kind, tensor.shape, content, raw=True))
            return name
        self.data.write(bytes(-self.data.tell() % ALIGNMENT))
        made = onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape)
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.data_name), ("offset", self.data.tell()), ("length", len(content))):
            made.external_data.add(key=key, value=str(value))
        self.data.write(content)
        self.weights.append(made)
        return name

    # ------------------------------------------------------------ the whole

    def input(self, name: str, dtype: str, shape: Sequence[str | int]) -> str:
        self.inputs.append(self._described(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[str | int], dtype: str = "FLOAT") -> None:
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self._described(name, dtype, shape))

    def _described(self, name: str, dtype: str, shape: Sequence[str | int]) -> Any:
        kind = getattr(self.onnx.TensorProto, dtype)
        return self.onnx.helper.make_tensor_value_info(name, kind, list(shape))

    def save(self, path: Path) -> None:
        """Write the graph, checked by onnx where it knows the operators."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "layerwise", self.inputs, self.outputs, self.weights)
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="layerwise")
        path.write_bytes(model.SerializeToString(deterministic=True))
