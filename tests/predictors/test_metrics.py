"""Prediction metrics against plain loops that follow their definitions word by word."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.predictors import metrics


@st.composite
def judged(draw):
    """Forecasts [T, E] with many ties, and top-k ids [T, k] by weight."""
    tokens = draw(st.integers(1, 5))
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts - 1))
    steps = draw(st.lists(st.integers(0, 4), min_size=tokens * experts, max_size=tokens * experts))
    probability = np.array(steps, np.float32).reshape(tokens, experts) / 4
    orders = [draw(st.permutations(range(experts))) for _ in range(tokens)]
    return probability, np.array(orders, np.uint8)[:, :top_k]


def best(row, count):
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:count]


@settings(deadline=None)
@given(judged())
def test_every_metric_is_its_definition(case):
    probability, topk_ids = case
    top_k = topk_ids.shape[1]
    ranking = metrics.ranked(probability, 2 * top_k)
    assert ranking.shape[-1] == min(2 * top_k, probability.shape[1])
    is_used = metrics.used(topk_ids, probability.shape[1])
    right, likely = metrics.claims(probability, is_used)
    for token, (row, ids) in enumerate(zip(probability, topk_ids.tolist(), strict=True)):
        high = best(row, top_k)
        assert metrics.top1(ranking, topk_ids)[token] == (high[0] == ids[0])
        share = len(set(best(row, 2)) & set(ids[:2])) / min(2, top_k)
        assert metrics.top2(ranking, topk_ids)[token] == share
        share = len(set(high) & set(ids)) / top_k
        assert metrics.recall(ranking[:, :top_k], topk_ids)[token] == pytest.approx(share)
        wide = len(set(best(row, 2 * top_k)) & set(ids)) / top_k
        assert metrics.recall(ranking, topk_ids)[token] == pytest.approx(wide)
        assert metrics.exact(ranking, topk_ids)[token] == (set(high) == set(ids))
        assert set(np.flatnonzero(is_used[token]).tolist()) == set(ids)
        claimed = {expert for expert, value in enumerate(row) if value >= 0.5}
        assert (right[token], likely[token]) == (len(claimed & set(ids)), len(claimed))
        squares = [
            (float(value) - (expert in ids)) ** 2 for expert, value in enumerate(row.tolist())
        ]
        assert metrics.brier(probability, is_used)[token] == pytest.approx(np.mean(squares))


@settings(deadline=None)
@given(judged(), st.randoms())
def test_recall_on_misses_counts_missed_look_ups_only(case, random):
    probability, topk_ids = case
    is_missed = np.array([[random.random() < 0.5 for _ in row] for row in topk_ids])
    ranking = metrics.ranked(probability, topk_ids.shape[1])
    foretold, all_missed = metrics.recall_on_misses(metrics.found(ranking, topk_ids), is_missed)
    for token, row in enumerate(probability):
        missed = {int(e) for e, m in zip(topk_ids[token], is_missed[token], strict=True) if m}
        assert all_missed[token] == len(missed)
        assert foretold[token] == len(missed & set(best(row, topk_ids.shape[1])))


def test_random_forecasts_name_the_first_expert_once_in_e():
    generator = np.random.default_rng(0)
    probability = generator.random((40_000, 64))
    ids = generator.random((40_000, 64)).argsort(axis=1)[:, :6]
    ranking = metrics.ranked(probability, 12)
    assert metrics.top1(ranking, ids).mean() == pytest.approx(1 / 64, abs=0.002)
    assert metrics.recall(ranking[:, :6], ids).mean() == pytest.approx(6 / 64, abs=0.003)
    assert metrics.recall(ranking, ids).mean() == pytest.approx(12 / 64, abs=0.003)


VALUES = st.lists(
    st.tuples(st.integers(0, 10), st.booleans(), st.integers(0, 2)), min_size=1, max_size=60
)


@settings(deadline=None)
@given(VALUES, st.integers(1, 6))
def test_reliability_is_counted_bin_by_bin(rows, bins):
    probability = np.array([row[0] for row in rows]) / 10
    is_used = np.array([row[1] for row in rows])
    group = np.array([row[2] for row in rows])
    edges = metrics.bin_edges(probability, bins=bins)
    table = metrics.reliability(probability, is_used, edges=edges, group=group, num_groups=3)
    limits = [-np.inf, *edges.tolist(), np.inf]
    for document in range(3):
        for place, (low, high) in enumerate(itertools.pairwise(limits)):
            inside = [row for row in rows if row[2] == document and low < row[0] / 10 <= high]
            assert table.count[document, place] == len(inside)
            assert table.observed[document, place] == sum(row[1] for row in inside)
            forecast = sum(row[0] / 10 for row in inside)
            assert table.forecast[document, place] == pytest.approx(forecast)
    whole = metrics.reliability(probability, is_used, edges=edges)
    expected = 0.0
    for low, high in itertools.pairwise(limits):
        inside = [row for row in rows if low < row[0] / 10 <= high]
        if inside:
            gap = np.mean([row[0] / 10 for row in inside]) - np.mean([row[1] for row in inside])
            expected += abs(gap) * len(inside) / len(rows)
    assert whole.error()[0] == pytest.approx(expected)
    assert table.count.sum() == whole.count.sum() == len(rows)


def test_bins_hold_equal_masses_where_forecasts_differ():
    values = np.random.default_rng(0).random(1500) ** 3
    edges = metrics.bin_edges(values, bins=15)
    counts = metrics.reliability(values, values > 0.5, edges=edges).count
    assert counts.tolist() == [[100] * 15]


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not():
    generator = np.random.default_rng(0)
    truth = generator.random(60_000)
    is_used = generator.random(60_000) < truth
    sharp = np.clip(0.5 + 2 * (truth - 0.5), 0, 1)
    errors = [
        metrics.reliability(p, is_used, edges=metrics.bin_edges(p)).error()[0]
        for p in (truth, sharp, np.full_like(truth, is_used.mean()))
    ]
    assert errors[0] < 0.01
    # |2x - 1/2 - x| inside, |x - 0| and |1 - x| where clipped: 1/8 on average.
    assert errors[1] == pytest.approx(0.125, abs=0.01)
    # A constant at the base rate is calibrated too, which is why skill is asked for beside it.
    assert errors[2] < 1e-9
    scores = [np.square(p - is_used).mean() for p in (truth, np.full_like(truth, is_used.mean()))]
    assert metrics.skill(np.array(scores[0]), np.array(scores[1])) == pytest.approx(1 / 3, abs=0.02)
    assert metrics.skill(np.array(scores[1]), np.array(scores[1])) == 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        # Documents differ; tokens of one document are alike: the case where tokens must not be
        # resampled one by one.
        centre = generator.normal(0.5, 0.1, 40)
        counts = generator.integers(5, 30, 40)
        values = np.repeat(centre, counts) + generator.normal(0, 0.01, counts.sum())
        document = np.repeat(np.arange(40), counts)
        sums = metrics.by_document(values, document, 40)
        sizes = metrics.by_document(np.ones(len(values)), document, 40)
        bootstrap = metrics.Bootstrap(40, replicates=300, seed=trial)
        low, high = bootstrap.interval(metrics.ratio, sums, sizes)
        covered += low <= 0.5 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_one_document_has_an_interval_of_no_width_and_no_misses_have_none():
    bootstrap = metrics.Bootstrap(1)
    assert bootstrap.interval(metrics.ratio, np.array([3.0]), np.array([4.0])) == (0.75, 0.75)
    assert bootstrap.interval(metrics.ratio, np.array([0.0]), np.array([0.0])) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=30))
def test_sums_by_document_are_sums(rows):
    document = np.array([row[0] for row in rows])
    values = np.array([[row[1], 1.0] for row in rows])
    sums = metrics.by_document(values, document, 4)
    for number in range(4):
        mine = [row[1] for row in rows if row[0] == number]
        assert sums[number] == pytest.approx([sum(mine), len(mine)])
