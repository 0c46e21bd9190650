"""The correlated moments, weights and statistics of the quantization tests serve here too."""

from __future__ import annotations

from tests.quantize.conftest import moments, site, weight  # noqa: F401
