"""Modules that hold a stored form and multiply from it.

Their state is the stored tensors under the stored names (``weight``, ``weight_scale``, …), so that a network's
``state_dict`` is the artifact's file. Casting a network casts its activations, norms and biases, never what is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.forms import restore_form
from layerwise.encoding.inputs import InputGrid, restore_inputs
from layerwise.encoding.repacked import Multiplier, RowTable, packed_table, repack
from layerwise.errors import InputError
from layerwise.kernels.gpu import DEVICE
from layerwise.network.operators import packed_product, packed_rows, register

ACTIVATIONS = ("exact", "int8")


class Packed(nn.Module):
    """Common ground: stored tensors as buffers named ``"weight" + suffix``, and the form that they restore to.

    spec:    the form's spec.
    tensors: suffix -> tensor; on the meta device while a network is being loaded.
    dtype:   of what the module returns where its inputs do not decide.
    """

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.stored = {f"weight{suffix}": suffix for suffix in sorted(tensors)}
        self.kept = list(self.stored)  # buffers that hold their stored type whatever the network is cast to
        for name, suffix in self.stored.items():
            self.register_buffer(name, tensors[suffix])
        # Empty, but it follows .to() like any buffer, and so remembers the network's dtype.
        self.register_buffer("_compute", torch.empty(0, dtype=dtype), persistent=False)
        self._restored: tuple[tuple[Tensor, ...], Encoded] | None = None
        self._repacked: tuple[Encoded, tuple[int, ...], Multiplier | None] | None = None
        self._table: tuple[Encoded, tuple[int, ...], RowTable | None] | None = None
        self.int8_activations = False  # see set_activations
        self._number = register(self)  # by which operators know it

    @property
    def encoded(self) -> Encoded:
        """The stored form over the present buffers; raises ``InputError`` if they do not fit the spec."""
        buffers = tuple(self._buffers[name] for name in self.stored)
        if self._restored is None or any(a is not b for a, b in zip(self._restored[0], buffers, strict=True)):
            tensors = {suffix: self._buffers[name] for name, suffix in self.stored.items()}
            self._restored = buffers, restore_form(self.spec, tensors)  # type: ignore[arg-type, assignment]
        return self._restored[1]  # type: ignore[index]

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias`` in ``x``'s dtype.

        By a compiled kernel where the form has one and nothing but values is wanted; it adds a float32 bias to float32
        activations as it writes, which is the same sum without another pass over it.
        """
        kernel = self.kernel() if kernel_takes(x) and x.device == self._device() else None
        if kernel is None:
            y = self.encoded.multiply(x)
            return y if bias is None else y + bias.to(y.dtype)
        int8 = self.int8_activations and not kernel.table
        if bias is None or (x.dtype == torch.float32 and _plain_bias(bias)):
            return kernel.multiply(x, int8=int8, bias=bias)
        y = kernel.multiply(x, int8=int8)
        return y + bias.to(y.dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What ``forward`` computes; without its bias the operator runs it, see ``operators.py``."""
        return self.multiply(x, bias)

    def traced_product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``product``, where a graph is traced as one node and a sum."""
        if not torch.compiler.is_compiling():
            return self.product(x, bias)
        y: Tensor = packed_product(x, self._number, self.spec["shape"][0])
        return y if bias is None else y + bias.to(y.dtype)

    def look_up(self, index: Tensor) -> Tensor:
        """Rows of the form, float32 ``[..., columns]``."""
        flat = index.reshape(-1)
        table = self._rows() if flat.device.type == "cpu" and flat.dtype == torch.int64 else None
        rows = self.encoded.take_rows(flat) if table is None else table.take(flat)
        return rows.view(*index.shape, self.spec["shape"][1])

    def kernel(self) -> Multiplier | None:
        """The form in the kernels' layout, made at the first product and again whenever a stored tensor changed."""
        form, versions = self._present()
        if self._repacked is None or self._repacked[0] is not form or self._repacked[1] != versions:
            self._repacked = form, versions, repack(form)
        return self._repacked[2]

    def _rows(self) -> RowTable | None:
        """The form as rows to look up: it points into the stored tensors, and is described again when they changed."""
        form, versions = self._present()
        if self._table is None or self._table[0] is not form or self._table[1] != versions:
            self._table = form, versions, packed_table(form)
        return self._table[2]

    def _present(self) -> tuple[Encoded, tuple[int, ...]]:
        """The form, and numbers that change when a stored tensor does."""
        form = self.encoded
        buffers: list[Tensor] = [self._buffers[name] for name in self.stored]  # type: ignore[misc]
        return form, tuple(0 if t.is_inference() else t._version for t in buffers)

    def _device(self) -> torch.device:
        """Where the stored tensors are."""
        first: Tensor = self._buffers[next(iter(self.stored))]  # type: ignore[assignment]
        return first.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network around this module computes in."""
        compute: Tensor = self._compute  # type: ignore[assignment]
        return compute.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        packed = {name: self._buffers[name] for name in self.kept}
        for name in packed:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(packed)
        for name, tensor in packed.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_restored": None, "_repacked": None, "_table": None}  # made again from copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        import copy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        twin._number = register(twin)
        return twin

    def extra_repr(self) -> str:
        rows, columns = self.spec.get("shape", (0, 0))
        options = ", ".join(f"{k}={v}" for k, v in self.spec.items() if k not in ("shape", "layout"))
        return f"{rows}x{columns}, {options}"


class PackedLinear(Packed):
    """``y = x W^T + b`` from the stored form; ``W`` is ``[out, in]`` also where the dense module kept ``[in, out]``.

    inputs:        spec of the grid that ``x`` is rounded to first, or None: ``x`` is multiplied as it is.
    input_tensors: suffix of ``input`` -> what that grid stores.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        inputs: Mapping[str, Any] | None = None,
        input_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(spec, tensors, dtype)
        self.out_features, self.in_features = spec["shape"]
        self.bias = bias
        self.input_spec = None if inputs is None else dict(inputs)
        self.stored_inputs = {f"input{suffix}": suffix for suffix in sorted(input_tensors or {})}
        self.kept += self.stored_inputs
        for name, suffix in self.stored_inputs.items():
            self.register_buffer(name, (input_tensors or {})[suffix])
        self._grid: tuple[tuple[Tensor, ...], InputGrid] | None = None

    @property
    def inputs(self) -> InputGrid | None:
        """The grid over the present buffers; raises ``InputError`` if they do not fit its spec."""
        if self.input_spec is None:
            return None
        buffers = tuple(self._buffers[name] for name in self.stored_inputs)
        if self._grid is None or any(a is not b for a, b in zip(self._grid[0], buffers, strict=True)):
            tensors = {suffix: self._buffers[name] for name, suffix in self.stored_inputs.items()}
            self._grid = buffers, restore_inputs(self.input_spec, tensors)  # type: ignore[arg-type, assignment]
        return self._grid[1]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_grid": None}

    def extra_repr(self) -> str:
        given = "" if self.input_spec is None else f", inputs: {self.input_spec['form']} {self.input_spec['bits']} bits"
        return super().extra_repr() + given

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        grid = self.inputs
        return self.multiply(x if grid is None else grid.rounded(x), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.traced_product(x, self.bias)


class PackedConv(Packed):
    """A convolution whose kernel, flattened to ``[out, in * kh * kw]``, is decoded before it is applied."""

    def __init__(
        self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], convolution: nn.Conv2d, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, tensors, dtype)
        self.shape = tuple(convolution.weight.shape)
        self.stride, self.padding, self.dilation = convolution.stride, convolution.padding, convolution.dilation
        self.bias = convolution.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded kernel ``[out, in, kh, kw]``: vision transformers look up the type that theirs computes in."""
        if "weight" not in self._buffers:
            raise AttributeError("weight")
        codes: Tensor = self._buffers["weight"]  # type: ignore[assignment]
        return codes if codes.is_meta else self.encoded.decode().view(self.shape).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.encoded.decode().view(self.shape).to(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]


class PackedEmbedding(Packed):
    """Looks up rows of the stored form. ``scale`` is the factor that some networks' own tables apply."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        padding_idx: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(spec, tensors, dtype)
        self.num_embeddings, self.embedding_dim = spec["shape"]
        self.padding_idx = padding_idx  # matters for gradients only: its row is stored and looked up like any other
        self.scale = scale

    def forward(self, index: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            rows = packed_rows(index, self._number, self.embedding_dim, self._compute)
        else:
            rows = self.look_up(index).to(self.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)


class PackedHead(nn.Module):
    """A head tied to a packed table: it multiplies from the table's stored form and stores nothing itself.

    bias:       the head's own bias, or None.
    bias_owner: the module whose ``bias`` is used instead (BERT's decoder takes its parent's).
    """

    table: PackedEmbedding
    bias_owner: nn.Module | None

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None, bias_owner: nn.Module | None = None) -> None:
        super().__init__()
        # Kept out of the submodules: the table's tensors belong to the table alone.
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "bias_owner", bias_owner)
        self.out_features, self.in_features = table.num_embeddings, table.embedding_dim
        if bias_owner is None:
            self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The table's codes, as ``table.weight`` gives them."""
        return self.table.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias if self.bias_owner is None else self.bias_owner.bias  # type: ignore[assignment]
        return self.table.traced_product(x, bias)

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, tied"


def kernel_takes(x: Tensor) -> bool:
    """Whether a kernel may see ``x``: plain values on the CPU or a GPU, with no gradient to record and no tracing."""
    return (
        x.device.type in ("cpu", DEVICE)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and type(x) in (Tensor, nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap and grad hand over tensors without memory
    )


def _plain_bias(bias: Tensor) -> bool:
    """Whether a kernel may add ``bias``: float32 values on the CPU, with no gradient to record."""
    return (
        bias.device.type == "cpu"
        and bias.dtype == torch.float32
        and type(bias) in (Tensor, nn.Parameter)
        and bias.is_contiguous()
        and not (bias.requires_grad and torch.is_grad_enabled())
    )


def set_activations(network: nn.Module, activations: str) -> int:
    """Choose how the packed modules of ``network`` take their inputs, and return how many there are.

    ``exact``: as they are. ``int8``: rounded to int8 per token and group of columns before the product, which is
    faster and costs about half a percent of a layer's output. Forms without such a kernel stay exact.
    """
    if activations not in ACTIVATIONS:
        raise InputError(f"activations are {' or '.join(ACTIVATIONS)}, not {activations!r}")
    packed = [module for module in network.modules() if isinstance(module, Packed)]
    for module in packed:
        module.int8_activations = activations == "int8"
    return len(packed)
