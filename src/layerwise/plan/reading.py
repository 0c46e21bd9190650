"""Reading JSON that somebody may have edited or damaged: every mistake is one sentence that names the entry."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layerwise.errors import InputError, nearest

LARGEST_FILE = 64 << 20  # bytes
LONGEST_TEXT = 4096
MANY = 1 << 60  # largest whole number


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; refuses other files, duplicate keys, NaN and infinity."""
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r} is not a file; give the path of an existing plan.json")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"{what} {str(path)!r} has more than {LARGEST_FILE} bytes; no plan is that large")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {str(path)!r} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{what} {str(path)!r} is nested too deeply to be a plan") from None
    except ValueError as error:
        raise InputError(f"{what} {str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} {str(path)!r} must hold a JSON object, not {_kind(value)}")
    return value


@dataclass(frozen=True)
class Reader:
    """A JSON object and where it stands, for error messages."""

    value: dict[str, Any]
    where: str

    def only(self, *keys: str) -> None:
        for key in self.value:
            if key not in keys:
                raise InputError(f"{self.where} has the unknown entry {key[:80]!r}{nearest(key[:80], list(keys))}")

    def inner(self, key: str) -> Reader:
        value = self._get(key)
        if not isinstance(value, dict):
            self._refuse(key, "an object", value)
        return Reader(value, f"{self.where}, {key[:200]!r},")

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            self._refuse(key, "text", value)
        if len(value) > LONGEST_TEXT or len(key) > LONGEST_TEXT:
            raise InputError(f"{self.where} has a text of more than {LONGEST_TEXT} characters in {key[:80]!r}")
        if not value.isprintable():
            raise InputError(f"{self.where} has a character in {key[:80]!r} that cannot be printed")
        return value

    def whole(self, key: str, least: int) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            self._refuse(key, "a whole number", value)
        if not least <= value <= MANY:
            raise InputError(f"{self.where} must have {key!r} from {least} to {MANY}, not {_shown(value)}")
        return value

    def number(self, key: str, least: float = -math.inf) -> float:
        value = self._get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._refuse(key, "a number", value)
        if abs(value) > MANY or not value >= least:  # infinity is larger than MANY; NaN is refused by the parser
            asked = "finite" if least == -math.inf else f"finite and at least {least:g}"
            raise InputError(f"{self.where} must have {key!r} {asked}, not {_shown(value)}")
        return float(value)

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise InputError(f"{self.where} lacks the entry {key!r}")
        return self.value[key]

    def _refuse(self, key: str, wanted: str, value: Any) -> NoReturn:
        raise InputError(f"{self.where} must have {wanted} in {key[:200]!r}, not {_kind(value)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"the plan has the entry {key[:80]!r} twice in the same place")
            seen.add(key)
    return result


def _constant(text: str) -> NoReturn:
    raise InputError(f"the plan contains {text}, which is not a number")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _shown(value: int | float) -> str:
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > MANY else repr(value)
