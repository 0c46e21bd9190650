"""Pre-LN to Pre-CRMSNorm: a residual stream without a mean needs one number less than it has.

After the mean is gone (see ``C`` below) a vector of d numbers is described by d - 1, and the stream is narrowed:

    1. untie the head, then centre every writer:           W <- C W,  b <- C b,  E <- E C,   C = I - 1 1^T / d
    2. fold every norm into what reads it:                 b <- b + W b_norm,  W <- W diag(g_norm)
    3. ``basis=drop``: leave the last number out           writers lose row d;  readers W' = W[:, :d-1] - W[:, d] 1^T
       ``basis=rotate``: d - 1 orthonormal directions A    writers A^T W, tables E A;    readers W A       (A^T 1 = 0)
    4. norms: x / sqrt(|x|^2 / d + eps), where |x|^2 is    sum x^2 + (sum x)^2   or   sum x^2

``drop`` is the paper's. ``rotate`` is ours: a plain RMSNorm but for its divisor, and nothing grows: with ``drop``
readers take on their last column in every other one. All of it in float64, cast once at the end.

A norm whose output something else than linears reads (a pooling, the network's own output) cannot be folded: it keeps
``g`` and ``b`` and gives back all d numbers, and its readers stay as they are. Which norms are folded is tried out.

**Where it works.** No configuration of a transformers class can say d - 1 (heads do not divide it, and the class builds
LayerNorms of the width of its heads), so there is nothing to save as its own class: ``rewrite`` refuses every
checkpoint, and ``convert`` works on a module in memory. The narrowed matrices have (d - 1) / d of the numbers; an odd
width is slower on most machines.

Source: Jiang, Gu, Zhu, Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers*, arXiv 2305.14858, section 3.3. Left open there
and chosen here: heads are untied first, a head without a bias gets one, and norms that cannot be folded expand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.norms import Basis, CompressedRmsNorm, WriteOutput, untie
from layerwise.network.residual import Stream, centre, example_inputs, find_stream, numbers, seen_in
from layerwise.network.sites import is_linear, is_transposed
from layerwise.roles import NetworkRewrite
from layerwise.technique import option, technique

SAME = 1e-3  # of the output, in float32
OUTPUT_SIZES = ("out_features", "nf", "embedding_dim", "out_channels")
INPUT_SIZES = ("in_features", "nx")


@technique(paper="Pre-CRMSNorm")
class PreCrmsnorm(NetworkRewrite):
    basis: str = option("drop", choices=("drop", "rotate"), help="leave the last number out, or rotate it away")

    def rewrite(self, network: Network) -> Network:
        stream = find_stream(network.module, self.name)
        raise InputError(
            f"{self.name} narrows the residual stream of {network.architecture} from {stream.width} to "
            f"{stream.width - 1} numbers, which no config.json of its class can say; convert a module in memory "
            f"instead, or use pre_rmsnorm"
        )

    def convert(self, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> nn.Module:
        made = copy.deepcopy(module)
        if any(isinstance(member, CompressedRmsNorm) for member in module.modules()):
            return made
        inputs = dict(inputs) if inputs is not None else example_inputs(module)
        stream = find_stream(module, self.name, inputs)
        training = module.training
        with torch.no_grad():
            made.eval()
            untie(made, stream.shared)
            before = numbers(made(**inputs))
            readers = find_readers(made, stream, inputs, before)
            basis = Basis(stream.width, self.basis == "rotate")
            for name, axis in stream.writers.items():
                narrow_writer(made, name, axis, basis)
            for path in stream.entry:
                made.get_submodule(path).register_forward_hook(WriteOutput(basis))
            for path in stream.norms:
                compress_norm(made, path, readers[path], basis)
            self._check(made, inputs, before)
        return made.train(training)

    def _check(self, made: nn.Module, inputs: Mapping[str, Tensor], before: Tensor) -> None:
        """A forward that counts on the full width somewhere else is found by running it."""
        try:
            change = (numbers(made(**inputs)) - before).norm()
        except RuntimeError as reason:
            raise InputError(
                f"{self.name} refuses {type(made).__name__}: its forward counts on the full width ({reason})"
            ) from None
        if change > SAME * before.norm():
            raise InputError(
                f"{self.name} refuses {type(made).__name__}: with a narrower stream it computes another function"
            )


def find_readers(
    module: nn.Module, stream: Stream, inputs: Mapping[str, Tensor], before: Tensor
) -> dict[str, tuple[str, ...]]:
    """Norm -> the linears that read it, empty where something else reads it too (found by scaling it)."""
    with seen_in(module) as seen:
        module(**inputs)
    linears = [p for p in seen if is_linear(module.get_submodule(p))]
    found: dict[str, tuple[str, ...]] = {}
    for path in stream.norms:
        given = seen[path][1].data_ptr()
        reading = tuple(p for p in linears if seen[p][0].data_ptr() == given and seen[p][0].shape[-1] == stream.width)
        found[path] = reading if reading and _reads_alone(module, path, reading, inputs, before, stream.width) else ()
    return found


def _reads_alone(
    module: nn.Module,
    path: str,
    readers: tuple[str, ...],
    inputs: Mapping[str, Tensor],
    before: Tensor,
    width: int,
) -> bool:
    """Whether factors on the norm's output, taken back in its readers, change nothing."""
    factor = torch.linspace(0.5, 2.0, width)
    handles = [module.get_submodule(path).register_forward_hook(lambda m, given, y: y * factor.to(y))]
    for reader in readers:
        handles.append(
            module.get_submodule(reader).register_forward_pre_hook(lambda m, given: (given[0] / factor.to(given[0]),))
        )
    try:
        return bool((numbers(module(**inputs)) - before).norm() <= SAME * SAME * 10 * before.norm())
    finally:
        for handle in handles:
            handle.remove()


def narrow_writer(module: nn.Module, name: str, axis: int, basis: Basis) -> None:
    """A writer's parameter without its mean and one number narrower, in place."""
    path, _, leaf = name.rpartition(".")
    owner, parameter = module.get_submodule(path), module.get_parameter(name)
    value = basis.written(centre(parameter.double(), axis), axis)
    setattr(owner, leaf, nn.Parameter(value.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad))
    _resize(owner, OUTPUT_SIZES, basis.width)


def compress_norm(module: nn.Module, path: str, readers: tuple[str, ...], basis: Basis) -> None:
    """Put a compressed norm at ``path``, folded into its readers if it has any, in place."""
    norm = module.get_submodule(path)
    assert isinstance(norm, nn.LayerNorm)
    if not readers:
        made = CompressedRmsNorm(basis, norm.eps, True, norm.weight, norm.bias)
        module.set_submodule(path, made.to(next(module.parameters()).device))
        return
    for reader in readers:
        fold_into(module.get_submodule(reader), norm, basis)
    module.set_submodule(path, CompressedRmsNorm(basis, norm.eps))


def fold_into(reader: nn.Module, norm: nn.LayerNorm, basis: Basis) -> None:
    """Gain and bias of a norm into a linear that reads it, and its inputs one number narrower, in place."""
    parameter: nn.Parameter = reader.weight  # type: ignore[assignment]
    axis = 0 if is_transposed(reader) else 1
    weight = parameter.double()
    if norm.bias is not None:
        shift = torch.tensordot(weight, norm.bias.double(), dims=([axis], [0]))
        bias = getattr(reader, "bias", None)
        total = shift if bias is None else bias.double() + shift
        reader.bias = nn.Parameter(total.to(parameter.dtype), requires_grad=parameter.requires_grad)  # type: ignore[assignment]
    if norm.weight is not None:
        weight = weight * norm.weight.double().view([-1, 1] if axis == 0 else [1, -1])
    weight = basis.read(weight, axis).to(parameter.dtype).contiguous()
    reader.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)  # type: ignore[assignment]
    _resize(reader, INPUT_SIZES, basis.width)


def _resize(module: nn.Module, names: tuple[str, ...], width: int) -> None:
    """What a module says of its own size."""
    for name in names:
        if getattr(module, name, None) == width:
            setattr(module, name, width - 1)
