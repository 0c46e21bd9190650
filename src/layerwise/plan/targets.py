"""What each engine loads: the facts that restrict a plan made for it (``--target``) and that exporters check.

==============  ======================  ===========================================================================
target          ``layerwise export``    stored as
==============  ======================  ===========================================================================
layerwise       (the artifact itself)   every form
transformers    ``compressed-tensors``  ``pack-quantized`` linears, read by the compressed-tensors package
vllm            ``compressed-tensors``  the same; q/k/v and gate/up are one matrix there, and so of one format
llama.cpp       ``gguf``                Q4_0, Q5_0, Q8_0 (groups of 32, no zeros), TQ1_0/TQ2_0 (ternary groups of 256)
onnxruntime     ``onnx``                MatMulNBits; tables as the same codes
==============  ======================  ===========================================================================

A stored form is looked at through its ``spec`` alone, so that a plan (before anything is encoded) and an exporter
(afterwards) come to the same answer: what a plan for a target holds can always be exported to it.

Left out on purpose: other widths in compressed-tensors, which packages before 0.15 read in another order, and 8 bits
with zeros in vLLM, which passes its checks and then fails in the kernel. llama.cpp's Q4_1 and Q5_1 hold a group's
minimum in fp16, which the product of a step and a zero is not in general; its K-quants nest scales in blocks of 256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from layerwise.errors import InputError, nearest
from layerwise.recipe import parse_recipe

LAYERWISE = "layerwise"
QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
GATE_UP = (("gate_proj", "up_proj"),)


class Matrix(Protocol):
    """What a target asks of a site; ``network.sites.Site`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def columns(self) -> int: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def head(self) -> str | None: ...
    @property
    def kernel(self) -> tuple[int, ...] | None: ...
    @property
    def experts(self) -> str | None: ...


@dataclass(frozen=True)
class Grids:
    """Integer grids with fp16 steps: of these widths, with these groups (0 is the whole row), with zeros or without."""

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    symmetric: bool

    def __str__(self) -> str:
        bits, groups = _listed(self.bits), _listed(sorted(self.groups, key=lambda g: g or 1 << 30), {0: "whole rows"})
        return f"{bits} bits in groups of {groups} {'without' if self.symmetric else 'with'} zeros"


@dataclass(frozen=True)
class Target:
    """An engine.

    linear, table, head: grids of linears, of word tables and of heads; a tied pair must be of all three kinds' grids.
    planned:      the linears' grids that plans choose among, where that is not all of them.
    ternary:      groups of single-plane ternary linears.
    fused:        last names of sites that the engine multiplies as one matrix, whose format must be one.
    short_groups: whether the last group of a row may be shorter than the others.
    transposed:   whether modules that keep their weight as [in, out] may be encoded.
    experts:      whether single experts may be encoded.
    architectures: that its exporter knows; empty where it writes them all.
    """

    name: str
    export: str
    linear: tuple[Grids, ...]
    table: tuple[Grids, ...] = ()
    head: tuple[Grids, ...] = ()
    planned: tuple[Grids, ...] = ()
    ternary: tuple[int, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    short_groups: bool = False
    transposed: bool = False
    experts: bool = False
    architectures: tuple[str, ...] = ()

    def grids(self, site: Matrix) -> tuple[Grids, ...]:
        """The integer grids that a site may be on; none where the engine takes it at 16 bits only."""
        if site.kernel is not None or (site.transposed and not self.transposed) or (site.experts and not self.experts):
            return ()
        if site.kind == "linear":
            return self.linear
        if site.head is not None:  # one matrix with two uses
            return tuple(g for g in self.table if g in self.head)
        return {"table": self.table, "head": self.head}.get(site.kind, ())

    def refusal(self, spec: Mapping[str, Any], site: Matrix) -> str | None:
        """Why a site cannot keep the form of this ``spec``, as the end of a sentence; None where it can."""
        if spec["form"] == "dense":
            return None
        grids = self.grids(site)
        if not grids:
            return f"{self.name} takes this site at 16 bits only"
        return self._misfit(spec, grids, site.columns, site.kind == "linear")

    def holds(self, spec: Mapping[str, Any]) -> bool:
        """Whether a linear of some width could keep the form."""
        return spec["form"] == "dense" or self._misfit(spec, self.linear, None, True) is None

    def _misfit(
        self, spec: Mapping[str, Any], grids: tuple[Grids, ...], columns: int | None, linear: bool
    ) -> str | None:
        offered = " or ".join(str(g) for g in grids)
        if spec["form"] == "ternary" and self.ternary and linear:
            if spec["planes"] != 1 or spec["scale_bits"] != 16 or spec["group"] not in self.ternary:
                return f"{self.name} takes one plane with fp16 scales of groups of {_listed(self.ternary)}"
            return self._uneven(spec["group"], columns)
        if spec["form"] != "integer":
            return f"{self.name} takes {offered}"
        if spec["float_zero"] or spec["scale_bits"] != 16:
            return f"{self.name} takes fp16 steps and whole zeros"
        group = spec["group"] if columns is None or spec["group"] < columns else 0
        whole = {0, columns} if group == 0 else {group}  # a group that is as wide as the row is the row
        fits = any(spec["bits"] in g.bits and whole & set(g.groups) and spec["symmetric"] == g.symmetric for g in grids)
        return self._uneven(group, columns) if fits else f"{self.name} takes {offered}"

    def _uneven(self, group: int, columns: int | None) -> str | None:
        if self.short_groups or not group or columns is None or columns % group == 0:
            return None
        return f"{self.name} needs groups that divide the {columns} columns"


DECODERS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
BLOCKS = tuple(Grids((2, 4, 8), (16, 32, 64, 128), symmetric) for symmetric in (True, False))

TARGETS = {
    target.name: target
    for target in (
        Target(
            "transformers",
            "compressed-tensors",
            linear=(Grids((2, 4, 8), (0, 16, 32, 64, 128), True), Grids((2, 4, 8), (0, 16, 32, 64, 128), False)),
        ),
        Target(
            "vllm",
            "compressed-tensors",
            linear=(Grids((4, 8), (0, 32, 64, 128), True), Grids((4,), (0, 32, 64, 128), False)),
            planned=(Grids((4, 8), (0, 32, 64, 128), True),),  # these load in transformers too
            fused=QKV + GATE_UP,
        ),
        Target(
            "llama.cpp",
            "gguf",
            linear=(Grids((4, 5, 8), (32,), True),),
            table=(Grids((4, 5, 8), (32,), True),),
            head=(Grids((4, 5, 8), (32,), True),),
            ternary=(256,),
            transposed=True,
            architectures=DECODERS,
        ),
        Target(
            "onnxruntime",
            "onnx",
            linear=BLOCKS,
            table=BLOCKS,
            head=BLOCKS,
            short_groups=True,
            transposed=True,
            architectures=(
                *DECODERS,
                "Qwen3ForCausalLM",
                "GPT2LMHeadModel",
                "BertModel",
                "BertForSequenceClassification",
            ),
        ),
    )
}


def find_target(name: str | None) -> Target | None:
    """A target by name; None for ``layerwise``, which takes everything. Raises ``InputError`` for another name."""
    if name is None or name == LAYERWISE:
        return None
    if name not in TARGETS:
        known = [LAYERWISE, *TARGETS]
        raise InputError(f"there is no target {name!r}{nearest(name, known)}")
    return TARGETS[name]


def described(spec: Mapping[str, Any]) -> str:
    """A stored form in words: ``3 bits in groups of 64 with zeros and 8-bit scales``."""
    if spec["form"] == "superblock":
        return f"ggml's blocks {spec['type']}"
    if spec["form"] != "integer":
        return f"the form {spec['form']}"
    zeros = "real zeros" if spec["float_zero"] else "zeros"
    scales = " and 8-bit scales" if spec["scale_bits"] == 8 else ""
    groups = f"groups of {spec['group']}" if spec["group"] else "whole rows"
    return f"{spec['bits']} bits in {groups} {'without' if spec['symmetric'] else 'with'} {zeros}{scales}"


@cache
def spec_of(recipe: str) -> dict[str, Any]:
    """The spec of what a recipe stores, learnt by encoding a small matrix with it: true of any technique.

    Only its ``shape`` depends on the matrix; the groups are those that the recipe asks for.
    """
    import torch

    from layerwise.calibrate.statistics import SiteStatistics

    encoder = parse_recipe(recipe).encoder
    columns = 2 * max(32, int(getattr(encoder, "group", 0) or 0))
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    return encoder.draft().encode(weight, SiteStatistics.uninformed(4, columns)).spec()


def format_of(recipe: str, columns: int) -> str:
    """What an engine must be told to multiply a site: two sites of one format can be one matrix."""
    spec = dict(spec_of(recipe))
    spec.pop("shape")
    if 0 < columns <= (spec.get("group") or 0):
        spec["group"] = 0
    return "16 bits" if spec["form"] == "dense" else described(spec) if spec["form"] == "integer" else str(spec)


def _listed(values: Sequence[int], names: Mapping[int, str] | None = None) -> str:
    words = [(names or {}).get(v, str(v)) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
