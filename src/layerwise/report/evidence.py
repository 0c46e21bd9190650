"""What was measured, as one value: the schema of ``evidence.json``, its version, its reader and its writer.

Evidence is plain JSON, so that other tools can read it; the typed dictionaries below are its schema, and
``check_evidence`` holds a value against them. Parts marked ``NotRequired`` are absent when a run did not produce
them (no baseline, no sampled sites, no front): a reader must cope. Every number is finite or, where the type says
so, null: a quality figure that overflowed is stored as null.

Bytes are bytes of safetensors, bpw = 8 x bytes / dense parameters of what the bytes store, times are seconds,
damage is the predicted rise of the loss in the loss's own unit.
"""

import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from layerwise.errors import InputError

FORMAT = "layerwise-evidence"
VERSION = 1


# Functional, because "class" is a keyword of the language.
Network = TypedDict(
    "Network",
    {
        "name": str,  # hub id, or the directory as the user gave it
        "class": str,
        "parameters": int,  # tied counted once, buffers excluded
        "blocks": int,
        "dense_bytes": int,  # of the input's safetensors as stored
        "dense_dtype": str,
        "fingerprint": NotRequired[str],
        "sentence_transformers": NotRequired[bool],
    },
)


class Calibration(TypedDict):
    source: str
    sequences: int
    tokens: int
    fit: NotRequired[int]  # sequences in each split
    judge: NotRequired[int]
    steer: NotRequired[int]


class Evaluation(TypedDict):
    source: str
    sequences: int
    tokens: int
    same_source: bool  # set aside from the calibration text rather than given


class Data(TypedDict):
    calibration: Calibration
    evaluation: NotRequired[Evaluation]


class Budget(TypedDict):
    text: str  # as the user wrote it
    bytes: int


class Loss(TypedDict):
    name: str  # the metric it is: "kl" or "distance"
    unit: str


class Quality(TypedDict):
    value: float | None
    low: NotRequired[float | None]  # confidence interval
    high: NotRequired[float | None]


class Row(TypedDict):
    """One network in the comparison."""

    name: str  # "dense", "plan", "baseline"
    recipe: NotRequired[str | None]
    bytes: int
    bpw: float
    linear_bytes: NotRequired[int | None]
    quality: dict[str, Quality]
    latency_ms: NotRequired[float | None]


class Predicted(TypedDict):
    damage: float
    measured: NotRequired[float | None]


class Alternative(TypedDict):
    recipe: str
    bytes: int
    damage: float


class Site(TypedDict):
    site: str
    family: NotRequired[str]  # of the technique that won the site
    block: NotRequired[str | None]
    kind: Literal["linear", "table", "head", "other"]
    rows: int
    columns: int
    recipe: str
    bytes: int
    bpw: float
    damage: float
    next_better: NotRequired[Alternative | None]
    next_cheaper: NotRequired[Alternative | None]
    tokens: int  # calibration tokens that passed through it
    note: NotRequired[str]


class FrontPoint(TypedDict):
    """The plan at one budget. ``recipes`` holds, per site of ``sites``, an index into ``recipe_names``."""

    budget: int
    bytes: int
    damage: float
    recipes: list[int]
    site_bytes: NotRequired[list[int]]  # per site; without it sizes come from ``recipe_bpw``
    site_damage: NotRequired[list[float]]  # per site; without it the damage map stays on this plan


class Uniform(TypedDict):
    """One recipe on every linear."""

    recipe: str
    bytes: int
    damage: float
    measured: NotRequired[float | None]


class Sampled(TypedDict):
    """One candidate put into the dense network alone, its rise of the loss measured."""

    site: str
    recipe: str
    predicted: float
    measured: float


class Evidence(TypedDict):
    """The whole of ``evidence.json``."""

    format: str
    version: int
    created: str
    command: str
    replan: NotRequired[str]
    network: Network
    data: Data
    budget: NotRequired[Budget]
    loss: Loss
    rows: list[Row]
    predicted: NotRequired[Predicted | None]
    sites: list[Site]
    front: NotRequired[list[FrontPoint]]
    recipe_names: NotRequired[list[str]]
    recipe_bpw: NotRequired[dict[str, float]]
    uniform: NotRequired[list[Uniform]]
    sampled: NotRequired[list[Sampled]]
    checks: NotRequired[dict[str, Any]]
    seconds: dict[str, float]  # "total" and one entry per stage
    peak_memory: NotRequired[int | None]
    seed: NotRequired[int]
    threads: NotRequired[int]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[str]


def low_coverage(site: Mapping[str, Any]) -> str | None:
    """Why this site's statistics deserve less trust, or None.

    The site's own note counts first. A linear that fewer tokens reached than it has inputs has a singular second
    moment, whatever the note says.
    """
    if site.get("note"):
        return str(site["note"])
    if site["kind"] == "linear" and site["tokens"] < site["columns"]:
        return f"{site['tokens']:,} tokens for {site['columns']:,} inputs"
    return None


def row_named(evidence: Mapping[str, Any], name: str) -> Row | None:
    """The comparison's row of this name, if there is one."""
    return next((row for row in evidence["rows"] if row["name"] == name), None)


# ---------------------------------------------------------------- reading and writing


def write_evidence(evidence: Mapping[str, Any], path: Path) -> None:
    """Check, then write as JSON; the order of keys is kept, it is the order of the stages and metrics."""
    path.write_text(evidence_to_json(evidence), encoding="utf-8")


def evidence_to_json(evidence: Mapping[str, Any]) -> str:
    """JSON text of checked evidence; figures that are not finite become null."""
    finite = _finite(dict(evidence))
    check_evidence(finite)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def read_evidence(path: Path) -> dict[str, Any]:
    """Read ``evidence.json``, or the one inside a directory. Raises ``InputError`` for anything else."""
    file = path / "evidence.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no {file}; give a compressed network's folder or its evidence.json")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; give the evidence.json that layerwise wrote") from None
    return evidence_from_json(text, str(file))


def evidence_from_json(text: str, origin: str = "evidence") -> dict[str, Any]:
    """Parse and check. Raises ``InputError`` that names what is wrong."""
    try:
        value = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not valid JSON ({error}); give the evidence.json that layerwise wrote") from None
    return check_evidence(value, origin)


def check_evidence(value: Any, origin: str = "evidence") -> dict[str, Any]:
    """Hold ``value`` against the schema and return it. Unknown keys are kept, so that newer minor writers can add."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f'{origin} has no "format": "{FORMAT}"; give the evidence.json that layerwise wrote')
    if value.get("version") != VERSION:
        raise InputError(f"{origin} is version {value.get('version')!r}; this layerwise reads version {VERSION}")
    _check(value, Evidence, origin)
    _check_references(value, origin)
    return cast(dict[str, Any], value)


def _check_references(evidence: dict[str, Any], origin: str) -> None:
    names = [row["name"] for row in evidence["rows"]]
    if "dense" not in names or "plan" not in names or len(set(names)) != len(names):
        raise InputError(f"{origin}: rows must name 'dense' and 'plan' once each, not {names}")
    if evidence["network"]["parameters"] < 1:
        raise InputError(f"{origin}: network.parameters must be at least 1")
    sites, recipes = len(evidence["sites"]), len(evidence.get("recipe_names", []))
    for i, point in enumerate(evidence.get("front", [])):
        for key in ("recipes", "site_bytes", "site_damage"):
            if key in point and len(point[key]) != sites:
                raise InputError(f"{origin}: front[{i}].{key} must have one entry per site ({sites})")
        if any(not 0 <= index < recipes for index in point["recipes"]):
            raise InputError(f"{origin}: front[{i}].recipes must be indices into recipe_names (0 to {recipes - 1})")


def _check(value: Any, kind: Any, path: str) -> None:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        _check(value, arguments[0], path)
    elif is_typeddict(kind):
        _expect(isinstance(value, dict), path, "an object", value)
        for key, hint in get_type_hints(kind).items():
            if key in value:
                _check(value[key], hint, f"{path}.{key}")
            elif key in kind.__required_keys__:
                raise InputError(f"{path} lacks {key!r}")
    elif origin is list:
        _expect(isinstance(value, list), path, "a list", value)
        for i, item in enumerate(value):
            _check(item, arguments[0], f"{path}[{i}]")
    elif origin is dict:
        _expect(isinstance(value, dict), path, "an object", value)
        for key, item in value.items():
            _check(item, arguments[1], f"{path}.{key}")
    elif origin in (Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            _check(value, next(a for a in arguments if a is not type(None)), path)
    elif origin is Literal:
        _expect(value in arguments, path, " or ".join(repr(a) for a in arguments), value)
    elif kind is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), path, "a whole number", value)
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and math.isfinite(value), path, "a finite number", value)
    elif kind is not Any:
        _expect(isinstance(value, kind), path, {str: "text", bool: "true or false"}.get(kind, str(kind)), value)


def _expect(right: bool, path: str, wanted: str, value: Any) -> None:
    if not right:
        shown = repr(value)
        raise InputError(f"{path} must be {wanted}, not {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
