"""Two small recurrent policies over the layers of a network, with the log chance of what they draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from layerwise.prune._students import FEATURES

HIDDEN = 30
DEPTH = 2


class Removal(nn.Module):
    """Reads all layers in both directions; each is kept (1) or removed (0)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reads = nn.LSTM(FEATURES, HIDDEN, DEPTH, bidirectional=True, batch_first=True)
            self.says = nn.Linear(2 * HIDDEN, 2)

    def drawn(self, features: Tensor, generator: Generator) -> tuple[tuple[int, ...], Tensor]:
        """(1 or 0 for each row of ``features`` [layers, 5], the log chance of all of them together)."""
        chances = self.says(self.reads(features[None])[0][0]).log_softmax(1)  # [layers, 2]
        actions = torch.multinomial(chances.detach().exp(), 1, generator=generator).flatten()
        return tuple(actions.tolist()), chances[torch.arange(len(actions)), actions].sum()


class Shrinkage(nn.Module):
    """Reads layer after layer with the factor that it gave the one before; gives each the index of a factor."""

    def __init__(self, choices: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reads = nn.LSTM(FEATURES + 1, HIDDEN, DEPTH, batch_first=True)
            self.says = nn.Linear(HIDDEN, choices)

    def drawn(self, features: Tensor, generator: Generator, factors: Sequence[float]) -> tuple[tuple[int, ...], Tensor]:
        state, before, actions, total = None, 1.0, [], torch.zeros(())
        for row in features:
            seen, state = self.reads(torch.cat([row, row.new_tensor([before])])[None, None], state)
            chances = self.says(seen[0, 0]).log_softmax(0)
            action = int(torch.multinomial(chances.detach().exp(), 1, generator=generator))
            actions.append(action)
            total, before = total + chances[action], factors[action]
        return tuple(actions), total
