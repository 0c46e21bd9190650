"""The page: loads nothing, escapes everything, shows all parts, and its slider moves the plan."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.example_evidence import bare_evidence, decoder_evidence, encoder_evidence, hostile_evidence

from layerwise.errors import InputError
from layerwise.report.page import embedded, render_page

EVERY = [encoder_evidence, decoder_evidence, hostile_evidence, bare_evidence]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements with their attributes, text outside scripts and styles, and scripts by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


@pytest.mark.parametrize("make", EVERY)
def test_the_page_loads_nothing(make: Any) -> None:
    html = render_page(make())
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "a"}
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "fetch(" not in page.scripts[2] and "XMLHttpRequest" not in page.scripts[2]
    assert "default-src 'none'" in html


@pytest.mark.parametrize("make", EVERY)
def test_the_embedded_evidence_parses_back(make: Any) -> None:
    evidence = make()
    page = Page(render_page(evidence))
    assert len(page.scripts) == 3  # a hostile name opened no further one
    assert json.loads(page.scripts[0]) == evidence
    assert len(json.loads(page.scripts[1])["coverage"]) == len(evidence["sites"])


def test_hostile_names_stay_text() -> None:
    page = Page(render_page(hostile_evidence()))
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text
    assert embedded("</script><!--&\u2028") == '"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"'


def test_the_script_is_the_only_one_the_policy_allows() -> None:
    import base64
    import hashlib

    html = render_page(encoder_evidence())
    script = html[html.rindex("<script>") + len("<script>") : html.rindex("</script>")]
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in html


def test_all_parts_are_there() -> None:
    html = render_page(encoder_evidence())
    for wanted in ("all-MiniLM-L6-v2", "vs baseline 0.0431", "Layer map", "Predicted Pareto front", "STS-B Spearman",
                   "80.22 to 83.58", "Predicted against measured damage", "Spearman</th>", "Median ratio",
                   "Low coverage", "Where the bytes went", "By encoder", "Reproduce", "layerwise compress",
                   "layerwise plan", "fit 58, judge 45, steer 25", "torch 2.13.0", "set aside from the calibration",
                   "Peak memory", "<input type=\"range\""):  # fmt: skip
        assert wanted in html, wanted
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_parts_that_a_run_did_not_produce_are_said_to_be_missing() -> None:
    html = render_page(bare_evidence())
    for wanted in ("no front to show", "No single site was measured", "No uniform baseline", "Nothing was evaluated"):
        assert wanted in html
    assert ">None<" not in html and "nan" not in Page(html).text.split()


def test_low_coverage_is_left_out_when_there_is_none() -> None:
    assert "id='coverage'" not in render_page(decoder_evidence())


def test_same_evidence_same_page_and_other_input_is_refused() -> None:
    assert render_page(encoder_evidence()) == render_page(encoder_evidence())
    with pytest.raises(InputError):
        render_page({"format": "layerwise-evidence"})


PROBE = """<script>addEventListener("load", () => {
  const out = {}, cells = () => [...document.querySelectorAll("[data-site]")].map((c) => c.getAttribute("aria-label"));
  const slider = document.getElementById("budget");
  out.sites = cells().length; out.before = cells(); out.max = Number(slider.max); out.start = Number(slider.value);
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  out.cheap = cells(); out.words = slider.getAttribute("aria-valuetext");
  document.getElementById("reset").click(); out.after = cells();
  document.querySelectorAll(".toggle button")[1].click(); out.mode = document.getElementById("map").dataset.mode;
  const first = document.querySelector("[data-site][tabindex='0']"); first.focus();
  first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  out.walked = document.activeElement.dataset.site !== first.dataset.site;
  out.tip = document.getElementById("tip").textContent;
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.points = document.querySelectorAll("#scatter .point").length;
  out.charts = document.querySelectorAll(".chart > svg").length;
  const shown = document.createElement("pre"); shown.textContent = JSON.stringify(out);
  document.body.replaceChildren(shown);
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("make", [encoder_evidence, hostile_evidence])
def test_the_slider_in_a_browser(make: Any, tmp_path: Path) -> None:
    html = render_page(make())
    # The policy would refuse the probe as it should any other script; it is taken out for this test only.
    html = re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", html).replace("</body>", PROBE + "</body>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-sync", "--disable-component-update", "--window-size=500,900",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    try:
        dump = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        pytest.skip("Chromium does not start here")
    page = Page(dump)
    if not page.elements:
        pytest.skip("Chromium does not start here")
    seen = json.loads(page.text[page.text.index("{") :])
    assert seen["sites"] == 40 and 0 < seen["start"] < seen["max"]
    assert seen["cheap"] != seen["before"] == seen["after"]
    assert "bits per weight" in seen["words"] and seen["mode"] == "damage" and seen["walked"]
    assert "coverage" in seen["tip"] and seen["points"] > 20 and seen["charts"] == 2
    assert seen["overflow"] <= 0  # no sideways scrolling
