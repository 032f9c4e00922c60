"""Cost constants from times that are made up: the crossings come back."""

import pytest
from smoa_kernels.cost import CostModel

from benchmarks.kernels.fit import Sample, fit, regret

TRUTH = CostModel(form=7.0, form_per_rank=2.0, resident=3.0)
START = CostModel(form=60.0, form_per_rank=9.0, resident=44.0)


def samples(truth: CostModel) -> list[Sample]:
    return [
        Sample(
            tokens,
            rank,
            {
                "expand": tokens * rank,
                "modulate": tokens + truth.form + truth.form_per_rank * rank,
                "resident": tokens + truth.resident,
            },
        )
        for tokens in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
        for rank in (2, 3, 4, 8, 16)
    ]


def test_the_fit_chooses_as_the_truth_does() -> None:
    found = fit(samples(TRUTH), START)
    for sample in samples(TRUTH):
        for held in (True, False):
            way = found.way(sample.tokens, sample.rank, held)
            assert way == TRUTH.way(sample.tokens, sample.rank, held)


def test_regret_is_the_share_of_time_lost() -> None:
    sample = Sample(4, 4, {"expand": 3.0, "modulate": 2.0})
    assert sample.regret(START) == pytest.approx(0.5)
    assert sample.regret(CostModel(0.0, 0.0, 0.0)) == 0.0
    assert regret(samples(TRUTH), TRUTH) == 0.0
    assert regret(samples(TRUTH), START) > 0.1


def test_constants_stay_where_nothing_is_gained() -> None:
    # One rank of one token: no constants could choose better.
    assert fit([Sample(1, 2, {"expand": 1.0, "modulate": 50.0})], START) == START
