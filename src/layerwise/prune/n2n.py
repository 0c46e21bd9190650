"""N2N Learning: two recurrent policies search for a smaller student, rewarded for what students can be taught.

    stage 1  a bidirectional LSTM reads the layers; each is kept or removed
    stage 2  an LSTM reads the layers (one that is gone has width 0) and the factor it gave the one before; each gets a
             factor of its width
    reward   R = (acc_s / acc_t) C (2 - C),   C = 1 - params_s / params_t     -1 for layers that do not fit together
    update   the gradient of mean_n (R_n - b) sum_t log pi(a_t),  b = mean of all rewards before this update

``C (2 - C) = 1 - (params_s / params_t)^2``: of a smaller network ever less is gained, so accuracy comes to count. Every
student is taught for a few steps, by labels and the teacher's scores, before it is judged on images that it was not
taught; a student that was judged before keeps its reward. The first update has its own mean for b. Stage 2 starts from
the best student of stage 1, and the best of all is taught on.

Source: A. Ashok et al., *N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning*,
arXiv 1709.06030. Chosen here: a trajectory is reinforced by its own reward (the authors' code takes the mean of the
update); only widths shrink; a layer inherits its weights where its shape is the teacher's; policies learn faster than
theirs, as there are ten updates and not a hundred. A network that keeps all of itself earns nothing, so much is removed
early on.
What came of it (``layerwise bench n2n``): later students earn clearly more than those of random search, the best of all
does not, at a hundred students; and magnitude in as many bytes, masks counted, loses less. A baseline of search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Sparsifier
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Module

    from layerwise.prune._students import Chain, Student
    from layerwise.prune.sparsified import Examples, Sparsified

FACTORS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
JUDGED = 0.25  # share of the images that students are judged on
REFUSED = -1.0
RATE = 0.003  # Adam's, of the students


@technique(
    paper="N2N Learning",
    left_out="networks with residual paths, kernels that shrink, rewards under constraints, policies taken from one "
    "teacher to another, and a verb: layerwise bench n2n searches on a small convolutional network",
)
class N2n(Sparsifier):
    """A smaller student found by policy gradient: layers removed, then narrowed."""

    steps: int = option(10, minimum=0, help="updates of the policy in each stage; 0 changes nothing")
    students: int = option(5, minimum=1, help="students of an update")
    taught: int = option(25, minimum=1, help="steps that a student is taught before it is judged")
    finish: int = option(300, minimum=0, help="steps that the best student is taught in the end")
    rate: float = option(0.03, minimum=0, maximum=1, help="learning rate of the policies; 0 = random search")

    study = "chain"

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Random search: as many students, from policies that do not learn."""
        return ("rate=0.0",)

    def check(self, examples: Examples) -> None:
        from layerwise.prune._students import chain_of

        examples.targets("n2n")
        chain_of(examples.module, examples.pixels, "n2n")

    def sparsify(self, examples: Examples) -> Sparsified:
        import copy

        import torch

        from layerwise.prune._policies import Removal, Shrinkage
        from layerwise.prune._students import chain_of, parameters_of, teach
        from layerwise.prune.sparsified import Sparsified

        self.check(examples)
        teacher = copy.deepcopy(examples.module).eval()
        if not self.steps:
            return Sparsified(teacher)
        chain = chain_of(teacher, examples.pixels, "n2n")
        generator = torch.Generator().manual_seed(examples.seed)
        school = School(examples, chain, teacher, self.taught)
        policy = Removal(examples.seed)

        def kept(actions: tuple[int, ...]) -> Student:
            return tuple(width * action for width, action in zip(chain.teacher, actions, strict=True))

        features = chain.features(chain.teacher)
        rewards = self.search(lambda: policy.drawn(features, generator), policy, school, kept, examples)
        left = school.best()
        narrow, seen = Shrinkage(len(FACTORS), examples.seed), chain.features(left)
        rewards += self.search(
            lambda: narrow.drawn(seen, generator, FACTORS),
            narrow,
            school,
            lambda chosen: shrunk(left, chosen),
            examples,
        )
        student = chain.built(school.best(), examples.seed)
        assert student is not None
        pixels, labels, wanted = school.all
        teach(student, wanted, pixels, labels, self.finish, RATE, examples.seed)
        half = self.steps * self.students // 2
        figures = {
            "best reward": max(school.rewards.values()),
            "mean reward of the last half of stage 2": sum(rewards[-half:]) / max(1, half),
            "mean reward of the first half of stage 1": sum(rewards[:half]) / max(1, half),
            "mean reward of the last half of stage 1": sum(rewards[half : 2 * half]) / max(1, half),
            "students taught": float(len(school.rewards)),
            "parameters": float(parameters_of(student)),
        }
        return Sparsified(student, {}, {}, figures)

    def search(
        self,
        draw: Callable[[], tuple[tuple[int, ...], Tensor]],
        policy: Module,
        school: School,
        student_of: Callable[[tuple[int, ...]], Student],
        examples: Examples,
    ) -> list[float]:
        """One stage; returns the rewards in order."""
        import torch

        adam = torch.optim.Adam(policy.parameters(), lr=self.rate, foreach=False)
        past: list[float] = []
        for _ in range(self.steps):
            drawn = [draw() for _ in range(self.students)]
            rewards = [school.reward(student_of(actions)) for actions, _ in drawn]
            mean = sum(past) / len(past) if past else sum(rewards) / len(rewards)
            gain = torch.stack([(r - mean) * chance for r, (_, chance) in zip(rewards, drawn, strict=True)]).mean()
            adam.zero_grad(set_to_none=True)
            (-gain).backward()  # type: ignore[no-untyped-call]
            if self.rate:
                adam.step()
            past += rewards
            examples.stepped()
        return past


def reward_of(accuracy: float, teacher: float, parameters: int, of: int) -> float:
    """R = (acc_s / acc_t) C (2 - C)."""
    compression = 1 - parameters / of
    return accuracy / max(teacher, 1e-9) * compression * (2 - compression)


def shrunk(student: Student, chosen: tuple[int, ...]) -> Student:
    """Widths times the factors that were chosen, one at least; what is gone stays gone."""
    return tuple(w and max(1, round(w * FACTORS[c])) for w, c in zip(student, chosen, strict=True))


class School:
    """Teaches students for a few steps and remembers what each was worth."""

    def __init__(self, examples: Examples, chain: Chain, teacher: Module, steps: int) -> None:
        import torch

        from layerwise.prune._students import hits

        labels = examples.targets("n2n")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(examples.seed))
        cut = max(1, round(JUDGED * len(order)))
        self.judge, self.train = order[:cut], order[cut:]
        with torch.inference_mode():
            scores = teacher(examples.pixels)
        self.all = examples.pixels, labels, scores.clone()
        self.chain, self.teacher, self.steps, self.seed = chain, teacher, steps, examples.seed
        self.accuracy = hits(teacher, examples.pixels[self.judge], labels[self.judge])
        self.rewards: dict[Student, float] = {}

    def reward(self, student: Student) -> float:
        if student not in self.rewards:
            self.rewards[student] = self.judged(student)
        return self.rewards[student]

    def judged(self, student: Student) -> float:
        from layerwise.prune._students import hits, parameters_of, teach

        made = self.chain.built(student, self.seed) if any(student) else None
        if made is None:
            return REFUSED
        pixels, labels, wanted = self.all
        of = self.train
        teach(made, wanted[of], pixels[of], labels[of], self.steps, RATE, self.seed)
        accuracy = hits(made, pixels[self.judge], labels[self.judge])
        return reward_of(accuracy, self.accuracy, parameters_of(made), parameters_of(self.teacher))

    def best(self) -> Student:
        """The student of the highest reward, the first of equals; the teacher's own widths where all were refused."""
        found = max(self.rewards, key=lambda student: self.rewards[student], default=self.chain.teacher)
        return found if self.rewards.get(found, REFUSED) > REFUSED else self.chain.teacher
