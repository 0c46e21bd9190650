"""What the reverse pass tells of a table: exact marginals of its gradient, and the weight of entries never met."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.calibrate.moments import Moment
from layerwise.calibrate.reverse import DRAWS
from layerwise.calibrate.statistics import SiteStatistics
from layerwise.calibrate.tables import LookedUp, table_use
from layerwise.sensitivity.kronecker import damage

ENTRIES, WIDTH, TEXTS, LENGTH = 12, 6, 40, 9


def looked_up(seed: int = 0) -> tuple[LookedUp, Tensor]:
    """(a table that saw some texts, the gradient matrix of every text and draw ``[samples, entries, width]``).

    Every entry has a gradient size of its own, and a text's tokens share most of their direction.
    """
    generator = torch.Generator().manual_seed(seed)
    table = LookedUp(Moment(WIDTH), torch.zeros(ENTRIES), torch.zeros(ENTRIES))
    entries = torch.randint(0, ENTRIES - 2, (TEXTS, LENGTH), generator=generator)  # the last two are never met
    texts = torch.arange(TEXTS).repeat_interleave(LENGTH)
    table.counts += torch.bincount(entries.flatten(), minlength=ENTRIES)
    matrices = []
    for _ in range(DRAWS):
        shared = torch.randn(TEXTS, 1, WIDTH, generator=generator)
        own = torch.randn(TEXTS, LENGTH, WIDTH, generator=generator)
        gradients = (shared + 0.3 * own) * (1.0 + entries)[..., None]
        table.add(gradients.reshape(-1, WIDTH), entries.flatten(), texts)
        sums = torch.zeros(TEXTS, ENTRIES, WIDTH)
        matrices.append(sums.scatter_add(1, entries[..., None].expand(-1, -1, WIDTH), gradients))
    return table, torch.cat(matrices)


def test_the_rows_and_columns_are_the_marginals_of_the_gradient_matrix() -> None:
    table, matrices = looked_up()
    torch.testing.assert_close(table.rows, matrices.square().sum((0, 2)))
    torch.testing.assert_close(table.moment.sum, torch.einsum("sve,svf->ef", matrices, matrices))


def test_the_damage_of_one_entry_follows_what_the_loss_makes_of_it() -> None:
    """Averaged over directions, the damage of changing one entry is its own mean squared gradient: exactly so but for
    the share set aside for entries never met. Counts alone give every entry the same."""
    table, matrices = looked_up()
    counts, exact = table.counts.clone(), matrices.square().sum((0, 2)) / DRAWS / TEXTS  # loss terms: one a text
    statistics = SiteStatistics((table_use(table, TEXTS, 1.0),))
    for entry in range(ENTRIES - 2):
        found = 0.0
        for column in range(WIDTH):
            change = torch.zeros(ENTRIES, WIDTH)
            change[entry, column] = 1
            found += damage(change, statistics)
        assert 0.99 * float(exact[entry]) < found <= 1.001 * float(exact[entry])
    by_count = counts * float(exact.sum() / counts.sum())
    assert float((by_count / exact)[: ENTRIES - 2].max()) > 3


def test_entries_never_met_share_the_weight_of_those_met_once() -> None:
    table = LookedUp(Moment(WIDTH), torch.zeros(8), torch.zeros(8))
    entries = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    table.counts += torch.bincount(entries, minlength=8)
    gradients = torch.ones(8, WIDTH)
    table.add(gradients, entries, torch.arange(8))
    rows = table_use(table, 8, 1.0).rows
    assert abs(float(rows.sum()) - 8) < 1e-5
    torch.testing.assert_close(rows[3:], torch.full((5,), 2 / 5))  # two of eight were met once
    torch.testing.assert_close(rows[0], torch.tensor(6.0 * 6 / 8))


def test_a_table_that_saw_nothing_weighs_all_entries_alike() -> None:
    table = LookedUp(Moment(WIDTH), torch.zeros(4), torch.zeros(4))
    use = table_use(table, 0, 1.0)
    assert bool(torch.isfinite(use.rows).all()) and len(set(use.rows.tolist())) == 1


def test_gradients_of_a_texts_equal_tokens_add_up_and_those_of_single_tokens_do_not() -> None:
    gradients, entries = torch.ones(2, WIDTH), torch.tensor([3, 3])
    together, apart = (LookedUp(Moment(WIDTH), torch.zeros(4), torch.zeros(4)) for _ in range(2))
    together.add(gradients, entries, torch.tensor([0, 0]))
    apart.add(gradients, entries, torch.tensor([0, 1]))
    assert float(together.rows[3]) == 4 * WIDTH and float(apart.rows[3]) == 2 * WIDTH
