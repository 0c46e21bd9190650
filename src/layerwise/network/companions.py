"""The small files that make a checkpoint usable: tokenizer, generation settings, sentence-transformers' modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import InputError

PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "LICENSE*",
)
MODULE_FILES = (".json", ".txt", ".model", ".safetensors")
EXECUTABLE = (".py", ".pyc", ".so", ".bin", ".pt", ".pkl", ".sh")  # never copied, whatever matches


@dataclass(frozen=True)
class Companion:
    """One file to copy, and its place relative to the checkpoint."""

    source: Path
    place: str

    @property
    def weight_bytes(self) -> int:
        """What it adds to the size of the result: sentence-transformers' Dense modules have weights of their own."""
        return self.source.stat().st_size if self.place.endswith(".safetensors") else 0


def find_companions(directory: Path) -> tuple[Companion, ...]:
    """All companions of a checkpoint directory in a fixed order; raises ``InputError`` for pickled module weights."""
    found: dict[str, Companion] = {}
    for pattern in PATTERNS:
        for path in directory.glob(pattern):
            if path.is_file() and path.suffix not in EXECUTABLE:
                found[path.name] = Companion(path, path.name)
    for folder in _module_folders(directory):
        files = [p for p in sorted((directory / folder).iterdir()) if p.is_file()]
        kept = [p for p in files if p.suffix in MODULE_FILES]
        pickled = next((p for p in files if p.suffix == ".bin"), None)
        if pickled is not None and not any(p.suffix == ".safetensors" for p in kept):
            raise InputError(f"{pickled} is a pickle, which layerwise does not open; convert it to model.safetensors")
        for path in kept:
            found[f"{folder}/{path.name}"] = Companion(path, f"{folder}/{path.name}")
    return tuple(found[place] for place in sorted(found))


def _module_folders(directory: Path) -> list[str]:
    """Folders that modules.json lists, such as ``1_Pooling``."""
    listing = directory / "modules.json"
    if not listing.is_file():
        return []
    try:
        modules = json.loads(listing.read_text(encoding="utf-8"))
        folders = [module["path"] for module in modules]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise InputError(f"{listing} is not a list of sentence-transformers modules, each with a path") from None
    for folder in folders:
        if not isinstance(folder, str) or folder in (".", "..") or folder != Path(folder).name or "\\" in folder:
            if folder == "":
                continue
            raise InputError(f"{listing} names the folder {folder!r}; a module must lie in a folder beside it")
    return [folder for folder in folders if folder and (directory / folder).is_dir()]


def copy_companions(companions: Iterable[Companion], folder: Path) -> None:
    """Copy contents (not links, not permissions) into ``folder``."""
    for companion in companions:
        target = folder / companion.place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(companion.source, target)
