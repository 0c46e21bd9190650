"""The catalogue: the 187 papers of the field, as ``papers.json`` beside this file holds them, and the names they go by.

Nothing here is computed about a paper except its family, its year and its names; what the product makes of it is the
business of ``ledger.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from layerwise.errors import InputError, nearest


@dataclass(frozen=True)
class Family:
    """A kind of the catalogue, with the word that selects it and the words that a person reads."""

    name: str
    label: str
    application: bool = False  # its papers use a network for something; they are not methods for networks


FAMILIES: Mapping[str, Family] = {
    "quantization": Family("quantize", "Quantization"),
    "pruning-sparsity": Family("prune", "Pruning and sparsity"),
    "low-rank-sharing-factorization": Family("factorize", "Low rank and sharing"),
    "depth-layers-skipping-early-exit": Family("depth", "Depth and early exit"),
    "speculative-decoding": Family("speculate", "Speculative decoding"),
    "normalization-architecture": Family("normalize", "Norms and architecture"),
    "merging-editing-unlearning-watermarking": Family("merge", "Merging and editing"),
    "finetuning-peft-optimizer": Family("tune", "Fine-tuning and optimizers"),
    "distillation": Family("distill", "Distillation"),
    "nas-supernet": Family("nas", "Architecture search"),
    "interpretability-diagnostics-theory": Family("probe", "Diagnostics and theory"),
    "generative-image-video-3d-audio": Family("generative", "Generative media", application=True),
    "vision-application": Family("vision", "Vision", application=True),
    "nlp-application": Family("language", "Language", application=True),
    "medical-science-application": Family("science", "Medicine and science", application=True),
    "quantum": Family("quantum", "Quantum", application=True),
    "distributed-systems-crypto": Family("systems", "Systems and cryptography", application=True),
    "regulation-other": Family("other", "Regulation and other", application=True),
}
"""Kind in the catalogue -> family. The names are those of our folders where we have one."""


@dataclass(frozen=True)
class Paper:
    """A row of the catalogue. ``core`` is what it does and ``claim`` what it claims, both in our words."""

    short: str
    title: str
    kind: str
    core: str
    claim: str | None
    date: str | None
    org: str | None
    acts_on_network: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @property
    def year(self) -> int | None:
        """The year, where the date states one."""
        found = re.search(r"\b(19|20)\d\d$", self.date or "")
        return int(found.group()) if found else None

    @property
    def text(self) -> str:
        """What is searched by meaning."""
        return " ".join(part for part in (f"{self.short}: {self.title}.", self.core, self.claim) if part)


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, in the order of the catalogue."""
    rows = json.loads(catalogue_bytes())
    kept = Paper.__dataclass_fields__
    return tuple(Paper(**{key: value for key, value in row.items() if key in kept}) for row in rows)


def catalogue_bytes() -> bytes:
    return (files("layerwise.papers") / "papers.json").read_bytes()


def normal(name: str) -> str:
    """A name without case, spaces and punctuation: ``LN-free GPT-2`` and ``lnfree gpt2`` are one name."""
    return re.sub(r"[\W_]+", "", name.casefold())


def paper_named(name: str) -> Paper | None:
    """The paper of this name: its short name, its title, or a part of either that no other paper shares."""
    asked = normal(name)
    return _shorts().get(asked) or _aliases().get(asked)


@cache
def _shorts() -> Mapping[str, Paper]:
    return {normal(paper.short): paper for paper in papers()}


@cache
def _aliases() -> Mapping[str, Paper]:
    """Titles, what stands before a title's colon, a short name without its brackets, and what stands in them."""
    owners: dict[str, set[Paper]] = {}
    for paper in papers():
        outside, _, inside = paper.short.partition("(")
        for alias in (paper.title, paper.title.partition(":")[0], outside, inside):
            if len(normal(alias)) > 1:
                owners.setdefault(normal(alias), set()).add(paper)
    return {alias: next(iter(found)) for alias, found in owners.items() if len(found) == 1}


def family_named(name: str) -> Family:
    """The family with this name, label or catalogue kind. Raises ``InputError`` naming what there is."""
    for kind, family in FAMILIES.items():
        if normal(name) in {normal(kind), normal(family.name), normal(family.label)}:
            return family
    raise InputError(f"there is no family named {name!r}{_all_or_nearest(name, [f.name for f in FAMILIES.values()])}")


def years_named(text: str) -> range | None:
    """``2024`` or ``2020-2023`` -> years, ``none`` -> None: papers whose date states no year."""
    if text.strip().casefold() == "none":
        return None
    found = re.fullmatch(r"\s*(\d{4})\s*(?:-\s*(\d{4})\s*)?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise InputError(f"--year must be a year, a range such as 2020-2023, or none, not {text!r}")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _all_or_nearest(word: str, known: Sequence[str]) -> str:
    close = nearest(word, list(known))
    return close if "did you mean" in close else f"; families are {', '.join(known)}"
