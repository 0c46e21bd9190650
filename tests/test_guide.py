"""What the guide shows must run: the example technique, the reader of the file format, and the links between pages."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoding.test_superblocks import blocks

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.encoding.ggml_forms import form_of
from layerwise.encoding.superblocks import HALVES
from layerwise.recipe import parse_technique

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def generator() -> Any:
    """``docs/reference.py``, which makes pages while the guide is built."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def weight() -> torch.Tensor:
    """[6, 172]: groups of 64, 64 and 44."""
    return torch.randn(6, 172, generator=torch.Generator().manual_seed(3))


def test_the_example_technique_keeps_its_promises(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(block for block in python_blocks(ROOT / "CONTRIBUTING.md") if "class Trimmed" in block)
    module: Any = types.ModuleType("layerwise.quantize.trimmed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    technique = module.Trimmed(bits=3, group=64)
    assert str(technique) == "trimmed:bits=3,group=64"
    encoded = technique.encode(weight, SiteStatistics.uninformed(*weight.shape))
    assert encoded.nbytes == layout_bytes(technique.layout(*weight.shape))
    assert encoded.decode().shape == weight.shape
    whole = module.Trimmed(bits=3, group=64, keep=1.0).encode(weight, SiteStatistics.uninformed(*weight.shape))
    assert float((whole.decode() - weight).pow(2).mean()) < float(weight.pow(2).mean()) / 5


@pytest.mark.parametrize(
    "recipe",
    [f"rtn:bits={bits},group=64" for bits in range(2, 9)]
    + ["rtn:bits=3,group=0", "rtn:bits=4,group=32,symmetric=true", "rtn:bits=5,group=64,scale_bits=8"]
    + ["hqq:bits=4,group=64", "nf4:group=64", "nf4:scale_bits=8", "fp4:levels=e2m1", "fp4:levels=fp4,group=0"]
    + ["fireq", "fireq:bits=3,group=32", "adadim:along=outputs", "adadim:bits=3,group=32,along=outputs"]
    + ["slim_llm:bits=2,group=16", "slim_llm:bits=3,group=0", "high_impact:share=0.3,group=32", "high_impact:bits=1"]
    + ["svd_llm:ratio=0.5", "svd_llm:ratio=0.5,factor_bits=3", "caldera:bits=2,ratio=0.5"]
    + [
        "phnn:order=2,bits=4",
        "phnn:order=4",
        "dsformer:block=24,bits=5",
        "dsformer:atoms=5,block=64,kept=3,atom_bits=16",
    ]
    + ["ternary:group=64,scale_bits=8", "ptqtp", "bivit", "bivit:group=64,centred=false", "nupes:by_row=true"]
    + ["nupes:bits=3,group=64", "ptq161", "ptq161:share=0"]
    + [f"trellis:bits={bits},group=64,scale_bits={8 if bits % 2 else 16}" for bits in range(1, 6)]
    + ["trellis:bits=3,group=64,centred=true", "trellis:bits=4,group=0,scale_bits=8,centred=true"],
)
def test_the_reader_of_the_format_page_reads_what_we_write(weight: torch.Tensor, recipe: str) -> None:
    encoder: Any = parse_technique(recipe)
    encoded = encoder.encode(weight, SiteStatistics.uninformed(*weight.shape))
    assert (as_the_page_reads(encoded) == encoded.decode().numpy()).all()


@pytest.mark.parametrize("kind", HALVES)
def test_the_reader_of_the_format_page_reads_blocks_of_gguf_files(kind: str) -> None:
    encoded = form_of(kind, blocks(kind), 768)
    assert (as_the_page_reads(encoded) == encoded.decode().numpy()).all()


def as_the_page_reads(encoded: Encoded) -> Any:
    page: dict[str, Any] = {}
    source = next(block for block in python_blocks(ROOT / "docs" / "format.md") if "def decode" in block)
    exec(compile(source, "docs/format.md", "exec"), page)
    return page["decode"](encoded.spec(), {suffix: tensor.numpy() for suffix, tensor in encoded.tensors().items()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    made = generator().PAGES if page.parent.name == "docs" else ()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")) and target not in made:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_the_generated_reference_names_every_technique_option_verb_and_row() -> None:
    """The pages come from the package, so what is asserted is that nothing is left out."""
    import dataclasses

    from layerwise.evidence.rows import read_evidence, techniques_with_evidence
    from layerwise.technique import find, names

    pages = generator().pages()
    for name in names():
        section = pages["techniques.md"].partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert find(name).paper in section
        assert all(f"| `{field.name}` |" in section for field in dataclasses.fields(find(name)))
    for verb, command in generator().verbs():
        section = pages["commands.md"].partition(f"## layerwise {verb}\n")[2].partition("\n## ")[0]
        options = [p.opts[0] for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
        assert all(f"| `{option}` |" in section for option in options), verb
    for name in techniques_with_evidence():
        section = pages["evidence.md"].partition(f"## {name}\n")[2].partition("\n## ")[0]
        found = read_evidence(name)
        assert found is not None and section.count("\n| `") == len(found.rows)


def test_the_guide_lists_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert all(name in nav for name in written | set(generator().PAGES))
