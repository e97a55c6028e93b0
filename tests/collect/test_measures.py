"""Measures on arrays against slow references and known values."""

import math
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.analysis.clusters import (
    cluster_experts,
    coactivation_features,
    router_features,
    similarity_features,
)
from outrider.collect.analysis.measures import (
    concentration,
    conditional_entropy,
    divergence,
    entropy,
    frequency_bound,
    gini,
    lift,
    mutual_information,
)
from outrider.collect.analysis.reuse import ReuseCounts, StackDepths, hit_rates


def test_entropy_of_known_distributions():
    assert entropy(np.full(16, 3)) == pytest.approx(4)
    assert entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.zeros(4)) == 0
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5)
    np.testing.assert_allclose(entropy(np.array([[1, 1], [1, 3]])), [1, 0.811278], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_gini_is_the_mean_difference_and_concentration_the_peak(counts):
    n, mean = len(counts), sum(counts) / len(counts)
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert gini(np.array(counts)) == pytest.approx(differences / (2 * n * n * mean), abs=1e-9)
    assert concentration(np.array(counts)) == pytest.approx(max(counts) / mean)


def test_information_of_planted_tables(rng):
    # A permutation tells everything, an independent draw nothing, a noisy channel a known amount.
    assert mutual_information(np.eye(8) * 1000) == pytest.approx(3, abs=0.01)
    independent = rng.multinomial(200_000, np.outer([0.7, 0.2, 0.1], np.full(20, 0.05)).ravel())
    assert mutual_information(independent.reshape(3, 20)) == pytest.approx(0, abs=2e-4)
    wrong = 0.11
    channel = rng.multinomial(200_000, [(1 - wrong) / 2, wrong / 2, wrong / 2, (1 - wrong) / 2])
    known = 1 + wrong * math.log2(wrong) + (1 - wrong) * math.log2(1 - wrong)
    assert mutual_information(channel.reshape(2, 2)) == pytest.approx(known, abs=0.01)


def test_the_bias_of_small_samples_is_taken_away(rng):
    tables = [rng.multinomial(2000, np.full(30 * 20, 1 / 600)).reshape(30, 20) for _ in range(20)]
    plain = [entropy(t.sum(0)) + entropy(t.sum(1)) - entropy(t.reshape(-1)) for t in tables]
    corrected = [mutual_information(table) for table in tables]
    assert np.mean(plain) > 0.15
    assert np.mean(corrected) < 0.15 * np.mean(plain)


def test_conditional_entropy_is_joint_less_marginal():
    joint = np.array([[5, 5, 0], [0, 0, 10]])
    assert conditional_entropy(joint) == pytest.approx(0.5)
    assert conditional_entropy(np.eye(4) * 3) == pytest.approx(0)


def test_divergence_is_symmetric_and_bounded():
    p, q = np.array([4, 0, 4, 0]), np.array([0, 1, 0, 1])
    assert divergence(p, q) == pytest.approx(1)
    assert divergence(p, 10 * p) == pytest.approx(0, abs=1e-12)
    mixed = np.array([3, 1, 3, 1])
    assert divergence(p, mixed) == pytest.approx(divergence(mixed, p))
    assert 0 < divergence(p, mixed) < 1


def test_lift_is_one_by_chance_and_large_for_pairs_that_go_together():
    tokens = 1000
    joint = np.diag([500, 500, 100, 100]).astype(float)
    joint[0, 1] = joint[1, 0] = 250
    joint[2, 3] = joint[3, 2] = 100
    found = lift(joint, tokens)
    assert found[0, 1] == pytest.approx(1)
    assert found[2, 3] == pytest.approx(10)
    assert found[0, 2] == 0


def test_frequency_bound_names_the_k_most_used():
    assert frequency_bound(np.array([10, 60, 30, 0]), 2) == pytest.approx(0.9)
    assert frequency_bound(np.zeros(3), 2) == 0


def _lru_hits(steps, slots):
    """The slow truth: a cache that is really kept."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = lookups = 0
    for step in steps:
        for key in step:
            lookups += 1
            if key in cache:
                hits += 1
                cache.move_to_end(key)
            else:
                cache[key] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
    return hits / lookups


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(5, 14), st.integers(1, 90))
def test_stack_depths_give_the_hit_rate_of_a_real_lru_at_every_size(seed, asked, keys, steps):
    rng = np.random.default_rng(seed)
    popular = rng.dirichlet(np.full(keys, 0.5)) + 1e-6
    stream = np.stack(
        [rng.choice(keys, asked, replace=False, p=popular / popular.sum()) for _ in range(steps)]
    )
    stack = StackDepths(keys)
    cuts = sorted(rng.integers(0, steps, 2))
    depths = np.concatenate([stack.add(part) for part in np.split(stream, cuts)])
    rates = hit_rates(np.bincount(depths.reshape(-1), minlength=keys + 2))
    assert rates[0] == 0 and len(rates) == keys + 1
    for slots in range(1, keys + 1):
        assert rates[slots] == pytest.approx(_lru_hits(stream.tolist(), slots))


def test_long_streams_are_cut_into_chunks_without_a_seam(rng, monkeypatch):
    stream = np.argsort(rng.random((500, 12)), axis=1)[:, :4]
    whole = StackDepths(12).add(stream)
    monkeypatch.setattr("outrider.collect.analysis.reuse._CELLS", 40)
    np.testing.assert_array_equal(StackDepths(12).add(stream), whole)


def test_gaps_are_tokens_between_two_uses(rng):
    ids = np.argsort(rng.random((300, 2, 9)), axis=2)[:, :, :3]
    counts = ReuseCounts(2, 9, 3)
    for part in np.array_split(ids, 7):
        counts.add(part)
    for layer in range(2):
        last, gaps = {}, []
        for step, experts in enumerate(ids[:, layer].tolist()):
            gaps += [step - last[expert] for expert in experts if expert in last]
            last.update(dict.fromkeys(experts, step))
        assert counts.gaps[layer].sum() == len(gaps)
        assert counts.gap_sums[layer] == sum(gaps)
        for bin_idx in range(4):
            expected = sum(2**bin_idx <= gap < 2 ** (bin_idx + 1) for gap in gaps)
            assert counts.gaps[layer][bin_idx] == expected


def test_one_cache_for_all_layers_is_a_real_lru_over_their_look_ups(rng):
    ids = np.argsort(rng.random((120, 3, 6)) - np.linspace(0, 0.6, 6), axis=2)[:, :, :2]
    counts = ReuseCounts(3, 6, 2)
    counts.add(ids)
    keys = (ids + np.arange(3)[:, None] * 6).reshape(120, -1).tolist()
    rates = hit_rates(counts.global_depths)
    for slots in (1, 2, 5, 6, 9, 14, 18):
        assert rates[slots] == pytest.approx(_lru_hits(keys, slots))
    # A cache smaller than one token's look-ups over all layers hits nothing (but by order).
    assert rates[1] == 0


def test_planted_groups_are_found_and_judged(rng):
    centres = 5 * rng.normal(size=(4, 10))
    members = np.repeat(np.arange(4), 6)
    shuffled = rng.permutation(24)
    features = (centres[members] + 0.3 * rng.normal(size=(24, 10)))[shuffled]
    found = cluster_experts(features, "router", num_clusters=4)
    assert found is not None
    groups = {}
    for label, truth in zip(found.labels, members[shuffled], strict=True):
        groups.setdefault(label, set()).add(truth)
    assert len(groups) == 4 and all(len(truths) == 1 for truths in groups.values())
    assert found.best_num_clusters == 4
    assert found.silhouette > 0.7 and found.stability == pytest.approx(1)
    noise = cluster_experts(rng.normal(size=(24, 10)), "router", num_clusters=4)
    assert noise is not None and noise.silhouette < 0.3 and noise.stability < 0.9


def test_groups_of_experts_that_do_not_differ_are_not_made_up():
    assert cluster_experts(np.zeros((8, 3)), "co-activation") is None
    assert cluster_experts(np.eye(8)[:, :2], "co-activation", num_clusters=8) is not None


def test_features_are_conditionals_and_correlations(rng):
    chosen = (rng.random((4000, 5)) < [0.5, 0.4, 0.3, 0.2, 0.1]).astype(float)
    chosen[:, 4] = chosen[:, 0]
    features = coactivation_features(chosen.T @ chosen)
    assert features[0, 4] == features[4, 0] == 1
    assert (np.diagonal(features) == 0).all()
    assert features[1, 2] == pytest.approx(0.3, abs=0.05)
    probability = rng.dirichlet(np.ones(6), 3000)
    found = similarity_features(probability.T @ probability, probability.sum(0), 3000)
    np.testing.assert_allclose(found, np.corrcoef(probability.T), atol=1e-9)
    assert similarity_features(np.zeros((2, 2)), np.zeros(2), 0) is None


def test_router_rows_are_found_beside_norms_and_biases():
    import torch

    tensors = {
        "layer_1.norm.weight": torch.ones(4),
        "layer_1.weight": torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]),
        "layer_1.bias": torch.ones(3),
    }
    rows = router_features(tensors, 1, 3)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 1], [0, 0]], atol=1e-6)
    assert router_features(tensors, 0, 3) is None
