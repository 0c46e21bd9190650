"""The report: one HTML file that shows what was chosen, why, and what it measured. It loads nothing.

The figures that matter are in the markup; the layer map and the charts are drawn by the inline script from the
evidence, which is embedded whole. Everything that comes from a network, a data set or a user is escaped: as text
in the markup, as ``\\u003c`` in the embedded JSON, as text nodes in the script. A content security policy that
allows only this script, by its hash, stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from layerwise.report import sections
from layerwise.report.evidence import evidence_to_json, low_coverage, row_named
from layerwise.report.figures import outcome, steering_metric

SCRIPTS = ("shared.js", "map.js", "front.js", "scatter.js", "page.js")


def render_page(evidence: dict[str, Any]) -> str:
    """The page of this evidence as HTML text. Raises ``InputError`` for evidence outside the schema."""
    clean = json.loads(evidence_to_json(evidence))
    script = "\n".join(["(() => {", '"use strict";', *map(_template, SCRIPTS), "})();"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    plan = row_named(clean, "plan")
    assert plan is not None  # the schema check saw to it
    name = clean["network"]["name"].rstrip("/").rpartition("/")[2] or clean["network"]["name"]
    return Template(_template("page.html")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
        style=_template("page.css"),
        script=script,
        name=escape(name),
        kind=escape(f"{clean['network']['class']}, {clean['network']['blocks']} blocks"),
        outcome=escape(outcome(clean)),
        created=escape(clean["created"][:10]),
        tiles=sections.tiles(clean),
        evaluation=sections.evaluation(clean),
        slide=" Move the slider to see the plan for another budget." if clean.get("front") else "",
        front=sections.front(clean),
        agreement=sections.agreement_section(clean),
        winners=sections.winners(clean),
        coverage=sections.coverage(clean),
        reproduce=sections.reproduce(clean),
        evidence=embedded(clean),
        derived=embedded(_derived(clean)),
    )


def embedded(value: Any) -> str:
    """JSON that cannot leave the script element it stands in, and parses back to the same value."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _derived(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """What the script shows but does not decide: coverage remarks, the metric that the damage predicts."""
    return {
        "coverage": [low_coverage(site) for site in evidence["sites"]],
        "steering": evidence["loss"]["name"] if steering_metric(evidence) == evidence["loss"]["name"] else None,
    }


def _template(name: str) -> str:
    return (files("layerwise.report") / "templates" / name).read_text(encoding="utf-8")
