"""The page of speed: what was timed stands in it, and what could not be says why."""

from __future__ import annotations

from benchmarks.performance import page

from layerwise.kernels.measure import PeerRow, Report, Row


def test_the_page_has_every_row_and_says_why_a_peer_is_absent() -> None:
    rows = (
        Row("int4", "int8", 64, 128, 1, 10.0, 1.0, 4096, 0.9, 8.0, 4.0, 0.25),
        Row("int4", "int8", 64, 128, 8, 20.0, 1.0, 4096, 0.4, 9.0, 5.0),
        Row("int2", "int8", 64, 128, 8, 15.0, 1.0, 2048, 0.3, 9.5, 5.5),
    )
    peers = (
        PeerRow("here", "int8", 4, 64, 128, 1, 25.0, 1.0),
        PeerRow("here", "int8", 4, 64, 128, 8, 30.0, 1.0),
        PeerRow("elsewhere", "bf16", 4, 64, 128, 1, None, None, "elsewhere is not installed"),
        PeerRow("elsewhere", "bf16", 4, 64, 128, 8, None, None, "elsewhere is not installed"),
    )
    report = Report("a processor", "avx512", 2, 1000, None, "2", rows, peers, {"here": "1.0"})
    text = page(report, {"A network": {"ours": 12.34, "theirs": "theirs is not installed"}})
    assert "| int4 | int8 | 64 × 128 | 10 | 90% | 25% | 8.00 | 4.00 | 2.50 |" in text
    assert "| int2 | int8 | 64 × 128 | 15 | 30% |  | 9.50 | 5.50 |  |" in text, "timed in rounds of its own"
    assert "### 1 token\n" in text and "### 8 tokens\n" in text and "here 1.0" in text
    assert text.count("elsewhere is not installed") == 2 and "| theirs | theirs is not installed |" in text
    assert "| ours | 12.3 |" in text
