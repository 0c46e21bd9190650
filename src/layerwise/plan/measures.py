"""What an allocator may ask of the network beyond the bytes and predicted damages that the tree already holds.

Published rules read different figures off a network: eigenvalues of its Hessian, how far a block turns its input, the
loss itself with some sites stored. Each is measured when a rule asks for it, once, on the same candidates and tokens
that every other rule gets (``layerwise/acts/measuring.py``); tests give made-up figures through the same door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import InputError

if TYPE_CHECKING:
    from layerwise.sensitivity.hessian import Hessian
    from layerwise.sensitivity.spectrum import Spectrum


@dataclass(frozen=True)
class Place:
    """A site: its number of weights, the block it lies in (None outside), whether the loss depends on it."""

    parameters: int
    block: str | None
    reached: bool = True


class Measures(ABC):
    """Figures of one network, by site, block and recipe."""

    @property
    @abstractmethod
    def places(self) -> Mapping[str, Place]:
        """Every site in execution order."""

    @abstractmethod
    def hessians(self) -> Mapping[str, Hessian]:
        """Site -> figures of its Hessian block; sites that the loss does not reach are absent."""

    @abstractmethod
    def scores(self, scorer: str) -> Mapping[str, Mapping[str, float]]:
        """Site -> recipe -> what a scorer (``hessian_norm:kind=trace``) makes of that candidate's change."""

    @abstractmethod
    def energies(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        """Site -> recipe -> (squared length of the candidate's change, squared length of the matrix)."""

    @abstractmethod
    def slopes(self, draws: int, size: float) -> Mapping[str, float]:
        """Site -> mean ``|L(W + size z) - L(W - size z)| / (2 size)`` over ``draws`` Gaussian ``z`` and sequences.

        Of the linears that the loss depends on, perturbed one at a time; no derivative is taken.
        """

    @abstractmethod
    def influence(self) -> Mapping[str, float]:
        """Block -> ``1 - mean cos`` between what enters and what leaves it."""

    @abstractmethod
    def outliers(self) -> Mapping[str, float]:
        """Block -> share of its linears' weights that lie more than one standard deviation above their mean."""

    @abstractmethod
    def spectra(self) -> Mapping[str, Spectrum]:
        """Site -> singular values of its weight; sites that the loss does not reach are absent."""

    @abstractmethod
    def rises(self, changes: Sequence[Mapping[str, str]]) -> list[float]:
        """The measured loss with the sites of each change in their stored forms (site -> recipe), all else dense."""


def asked(measures: Measures | None, name: str) -> Measures:
    """The measures, for a rule that cannot do without them."""
    if measures is None:
        raise InputError(f"{name} reads figures off the network; give allocate its measures")
    return measures
