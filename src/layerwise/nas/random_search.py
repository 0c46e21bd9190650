"""Random search: train a few architectures drawn at random, and go on with the one that does best.

    a_1 .. a_n uniform over what fits;   each gets  search / n  of the budget;   a* = argmin validation loss

The chosen network keeps its weights and is trained with the rest. The floor that every other search is held against:
the same space, images, limit and cost. It is a strong one: L. Li and A. Talwalkar, "Random Search and Reproducibility
for Neural Architecture Search", arXiv 1902.07638, found it level with the weight-sharing searches of its time. Choices
of ours: few candidates that are trained properly rather than many that are not; ``candidates=1`` is no search at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Search
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.nas.task import Found, Task

LOOKING = 0.05  # share of the budget that judging may cost


@technique(paper="Random search")
class RandomSearch(Search):
    """Trains a few architectures drawn at random and keeps the best; the floor that other searches must beat."""

    rivals = ("random_search:candidates=1",)

    candidates: int = option(4, minimum=1, maximum=1000, help="architectures that are drawn and trained")
    search: float = option(0.5, minimum=0.0, maximum=0.8, help="share of the budget that they are trained with")

    def search_in(self, task: Task) -> Found:
        import torch

        from layerwise.nas.network import Shape
        from layerwise.nas.task import Meter, finish, fresh, judge, judges, train_alone, trained_copy

        meter, generator = Meter(task), task.generator(2)
        order = torch.randperm(len(task.fitting), generator=generator).tolist()[: self.candidates]
        if len(order) == 1:
            only = task.fitting[order[0]]
            return finish(meter, Shape((only,)), [fresh(task, only)])
        tried, images = [], judges(meter, len(order), LOOKING)
        for number, index in enumerate(order):
            architecture = task.fitting[index]
            values = trained_copy(fresh(task, architecture, 100 + number))
            train_alone(meter, architecture, values, self.search * (number + 1) / len(order), generator)
            tried.append((judge(meter, [(architecture, values)], images), number, architecture, values))
        _, _, best, values = min(tried, key=lambda t: t[:2])
        seen = [(str(architecture), loss) for loss, _, architecture, _ in tried]
        return finish(meter, Shape((best,)), [values], seen)
