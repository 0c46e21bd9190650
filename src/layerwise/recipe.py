"""Techniques as text: ``gptq:bits=3,group=64`` and recipes such as ``awq+gptq:bits=3``, read and written.

A recipe is what a plan says of one site: any rewrites, then exactly one encoder, or the surgeon that took its block.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from layerwise.errors import InputError, nearest
from layerwise.roles import (
    ActivationQuantizer,
    Allocator,
    Blueprint,
    Distiller,
    Encoder,
    Generator,
    NetworkSurgeon,
    Probe,
    Rewrite,
    Search,
    Sparsifier,
    Surgeon,
    Tuner,
)
from layerwise.technique import Technique, find, names, technique_files

Role = TypeVar("Role", bound=Technique)


@dataclass(frozen=True)
class Recipe:
    """Techniques chained at one site: any rewrites, then exactly one encoder."""

    rewrites: tuple[Rewrite, ...]
    encoder: Encoder

    def __str__(self) -> str:
        return "+".join(str(t) for t in (*self.rewrites, self.encoder))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(t.needs for t in (*self.rewrites, self.encoder)))


def parse_technique(text: str) -> Technique:
    """``gptq:bits=3,group=64`` -> a technique with these options."""
    name, _, arguments = text.strip().partition(":")
    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in arguments.split(","))):
        key, equals, value = (s.strip() for s in part.partition("="))
        if key not in fields:
            raise InputError(f"{cls.name} has no option {key!r}{nearest(key, list(fields))}")
        if not equals or not value:
            raise InputError(f"option {key!r} of {cls.name} needs a value, written {key}=VALUE")
        options[key] = _read(cls.name, fields[key], value)
    return cls(**options)


@cache
def surgery(text: str) -> Surgeon | None:
    """The surgeon that a site's recipe names, where its block is gone; None for a recipe that stores something."""
    name = text.partition(":")[0].strip()
    if "+" in text or name.replace("-", "_") not in technique_files() or not issubclass(find(name), Surgeon):
        return None
    found = parse_technique(text)
    assert isinstance(found, Surgeon)
    return found


def canonical(text: str) -> str:
    """A site's recipe as we write it; raises ``InputError`` for what is none."""
    return str(surgery(text) or parse_recipe(text))


def parse_recipe(text: str) -> Recipe:
    """``awq+gptq:bits=3,group=64`` -> a recipe; the order is rewrites first, then one encoder."""
    parts = [parse_technique(part) for part in text.split("+") if part.strip()]
    rewrites = tuple(p for p in parts if isinstance(p, Rewrite))
    encoders = [p for p in parts if isinstance(p, Encoder)]
    if len(encoders) != 1 or len(rewrites) + 1 != len(parts) or parts[-1] is not encoders[-1]:
        raise InputError(
            f"recipe {text!r} must be rewrites followed by exactly one encoder, such as gptq:bits=3,group=64 "
            f"or awq+rtn:bits=4"
        )
    return Recipe(rewrites, encoders[0])


def _of_role(text: str, role: type[Role], subject: str, otherwise: str, listed: str) -> Role:
    """A technique of one role; an ``InputError`` names those there are, where ``listed`` has its ``{}``."""
    name = text.partition(":")[0].strip().replace("-", "_")
    if name not in (known := names(role)):
        what = otherwise if name in technique_files() else "does not exist"
        raise InputError(f"{subject} {name!r} {what}; {listed.format(', '.join(known))}")
    found = parse_technique(text)
    assert isinstance(found, role)
    return found


def parse_allocator(text: str) -> Allocator:
    """``hawq:kind=trace`` -> an allocator; another kind of technique, or none, names the allocators there are."""
    return _of_role(text, Allocator, "the allocator", "plans nothing", "the allocators are {}")  # type: ignore[type-abstract]


def parse_probe(text: str, seed: int = 0) -> Probe:
    """``spectrum_alpha:estimator=hill`` -> a probe; another kind of technique, or none, names the probes there are.

    ``seed`` is used where the probe has an option of that name that the text does not set.
    """
    found = _of_role(text, Probe, "the probe", "is no probe", "the probes are {}")  # type: ignore[type-abstract]
    return dataclasses.replace(found, seed=seed) if getattr(found, "seed", None) == 0 else found  # type: ignore[type-var]


def parse_tuner(text: str) -> Tuner:
    """``signround:steps=200`` -> a tuner."""
    found = parse_technique(text)
    if not isinstance(found, Tuner):
        raise InputError(
            f"{found.name} is no tuner, it cannot be run on a finished plan; write --tune {names(Tuner)[0]}"
        )
    return found


def parse_activations(text: str) -> ActivationQuantizer:
    """``token_int:bits=8`` -> what quantizes the inputs of linears."""
    listed = "give one of {}, such as token_int:bits=8"
    role = ActivationQuantizer
    return _of_role(text, role, "--activations", "quantizes no activations", listed)  # type: ignore[type-abstract]


def parse_surgeon(text: str) -> Surgeon | NetworkSurgeon:
    """``drop_block:count=2`` -> a surgeon, of blocks or of the whole network."""
    found = parse_technique(text)
    if not isinstance(found, (Surgeon, NetworkSurgeon)):
        listed = ", ".join([*names(Surgeon), *names(NetworkSurgeon)])
        raise InputError(f"{found.name} gives no network another shape; --surgeon takes one of {listed}")
    return found


def parse_blueprint(text: str) -> Blueprint:
    """``osp:projections=false`` -> a blueprint; another kind of technique, or none, names the blueprints there are."""
    return _of_role(text, Blueprint, "the blueprint", "is no blueprint", "the blueprints are {}")  # type: ignore[type-abstract]


def parse_generator(text: str) -> Generator:
    """``self_speculative:tokens=4`` -> a generator; another kind of technique, or none, names those there are."""
    return _of_role(text, Generator, "the method", "generates nothing", "the methods are {}")  # type: ignore[type-abstract]


def parse_distiller(text: str) -> Distiller:
    """``ted:steps=400`` -> a distiller; another kind of technique, or none, names the distillers there are."""
    return _of_role(text, Distiller, "the distiller", "distils nothing", "the distillers are {}")  # type: ignore[type-abstract]


def parse_sparsifier(text: str) -> Sparsifier:
    """``ssvi:density=0.05`` -> a sparsifier; another kind of technique, or none, names the sparsifiers there are."""
    return _of_role(text, Sparsifier, "the sparsifier", "does not train while it prunes", "the sparsifiers are {}")  # type: ignore[type-abstract]


def parse_search(text: str) -> Search:
    """``neas:members=3`` -> a search; another kind of technique, or none, names the searches there are."""
    return _of_role(text, Search, "the search", "searches no architecture", "the searches are {}")  # type: ignore[type-abstract]


def _read(owner: str, field: dataclasses.Field[Any], text: str) -> Any:
    kind: type[Any] = type(field.default)
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
        raise InputError(f"option {field.name!r} of {owner} must be {wanted}, not {text!r}") from None
