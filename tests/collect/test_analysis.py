"""Traces with a planted structure: the analysis must find what was put in."""

import json

import msgspec
import numpy as np
import pytest

from outrider.collect.analysis import analyze, compare, read_analysis, write_analysis
from outrider.collect.errors import CollectError, TraceError
from outrider.collect.trace import TraceReader, open_traces

WINDOW = 16


def _by_first(rng, first, experts):
    """Top-2 ids [T, 2]: the given first expert and another one at random."""
    other = (first + rng.integers(1, experts, first.shape)) % experts
    return np.stack([first, other], -1)


@pytest.fixture
def analysed(tmp_path, planted):
    def run(parts, *, layers=1, experts=8, top_k=2, window=WINDOW, **options):
        shape = planted.shape(layers=layers, experts=experts, top_k=top_k)
        planted.write(tmp_path / "T", shape, parts, window=window, shard_samples=50)
        return analyze([TraceReader(tmp_path / "T")], **({"num_clusters": 0} | options))

    return run


def test_uniform_routing_has_full_entropy_and_no_structure(analysed, rng):
    ids = np.argsort(rng.random((400 * WINDOW, 2, 16)), axis=-1)[..., :2]
    tokens = rng.integers(0, 40, len(ids))
    half = len(ids) // 2
    found = analysed(
        {
            "one": {"topk_ids": ids[:half], "token_id": tokens[:half]},
            "two": {"topk_ids": ids[half:], "token_id": tokens[half:]},
        },
        layers=2,
        experts=16,
    )
    for layer in found.layers:
        assert layer.routing_entropy == pytest.approx(4, abs=0.005)
        assert sum(layer.usage) == pytest.approx(2, abs=1e-3)
        assert layer.coverage == 1 and layer.concentration < 1.1 and layer.gini < 0.05
        assert layer.unique_pairs == 120
        assert layer.dataset_information == pytest.approx(0, abs=2e-3)
        assert layer.token_information == pytest.approx(0, abs=8e-3)
        assert layer.previous_overlap == pytest.approx(2 / 16, abs=0.01)
        assert layer.chance_overlap == pytest.approx(2 / 16, abs=0.01)
        assert layer.previous_top1 == pytest.approx(1 / 16, abs=0.01)
        assert layer.frequency_recall == pytest.approx(2 / 16, abs=0.01)
        assert layer.next_token_information == pytest.approx(0, abs=0.01)
        assert layer.next_token_entropy == pytest.approx(4, abs=0.05)
        assert layer.mean_reuse_gap == pytest.approx(8, abs=0.3)
        # Of 16 experts chosen at random, a cache of s hits s in 16.
        np.testing.assert_allclose(layer.lru_hit_rate, np.arange(17) / 16, atol=0.05)
        assert max(layer.drift_in_text) < 0.01 and max(layer.drift_over_time) < 0.03
        assert all(abs(pair.lift - 1) < 0.4 for pair in layer.top_lifts)
    assert found.layers[0].next_layer_information == pytest.approx(0, abs=0.01)
    assert found.layers[1].next_layer_entropy is None
    assert found.overall.effective_experts == pytest.approx(16, abs=0.1)
    assert found.overall.normalized_entropy == pytest.approx(1, abs=0.002)


def test_a_planted_usage_gives_its_entropy_and_extremes(analysed, rng):
    share = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625, 0, 0, 0])
    first = rng.choice(8, 200 * WINDOW, p=share)
    found = analysed({"one": {"topk_ids": first[:, None, None]}}, top_k=1)
    (layer,) = found.layers
    assert layer.routing_entropy == pytest.approx(1.875, abs=0.05)
    np.testing.assert_allclose(layer.usage, share, atol=0.03)
    assert layer.coverage == 5 / 8
    assert layer.concentration == pytest.approx(4, abs=0.3)
    assert layer.frequency_recall == layer.frequency_top1 == pytest.approx(0.5, abs=0.03)
    assert layer.chance_overlap == pytest.approx((share**2).sum(), abs=0.03)
    assert layer.previous_overlap == pytest.approx((share**2).sum(), abs=0.03)
    assert found.overall.most_used[:2] == (0, 0) and found.overall.least_used[2] == 0
    assert layer.unique_pairs == 0 and layer.router_entropy is None


def test_a_planted_chain_over_tokens_and_over_layers_is_found(analysed, rng):
    """Next token: stays with 0.5, else steps on. Next layer: the expert plus three, always."""
    samples, experts = 300, 8
    stays = rng.random((samples, WINDOW)) < 0.5
    start = rng.integers(0, experts, samples)
    first = (start[:, None] + np.cumsum(~stays, axis=1)) % experts
    first = first.reshape(-1)
    ids = np.stack([first, (first + 3) % experts], 1)[:, :, None]
    found = analysed({"one": {"topk_ids": ids}}, layers=2, top_k=1)
    for layer in found.layers:
        assert layer.next_token_entropy == pytest.approx(1, abs=0.02)
        assert layer.next_token_information == pytest.approx(2, abs=0.03)
        assert layer.previous_top1 == layer.previous_overlap == pytest.approx(0.5, abs=0.02)
    assert found.layers[0].next_layer_entropy == 0
    assert found.layers[0].next_layer_information == pytest.approx(3, abs=0.02)
    assert found.overall.next_layer_information == found.layers[0].next_layer_information


def test_experts_that_specialise_in_tokens_and_data_sets_are_found(analysed, rng):
    """In layer 0 the token decides the expert, in layer 1 the data set does, in layer 2 nothing."""
    rows = 150 * WINDOW
    parts = {}
    for dataset, name in enumerate(("one", "two")):
        tokens = rng.integers(0, 32, rows)
        by_token = tokens % 8
        by_dataset = 4 * dataset + rng.integers(0, 4, rows)
        ids = np.stack([by_token, by_dataset, rng.integers(0, 8, rows)], 1)[:, :, None]
        parts[name] = {"topk_ids": ids, "token_id": tokens}
    found = analysed(parts, layers=3, top_k=1)
    tokens, datasets, neither = found.layers
    assert tokens.token_information == pytest.approx(3, abs=0.03)
    assert tokens.dataset_information == pytest.approx(0, abs=5e-3)
    assert datasets.dataset_information == pytest.approx(1, abs=0.01)
    assert datasets.token_information == pytest.approx(0, abs=0.02)
    assert neither.token_information < 0.02 and neither.dataset_information < 5e-3
    expert = found.experts[3]
    assert (expert.layer_idx, expert.expert_idx) == (0, 3)
    assert {use.token_id for use in expert.top_tokens} == {3, 11, 19, 27}
    assert all(use.lift == pytest.approx(8, rel=0.15) for use in expert.top_tokens)
    in_two = found.experts[8 + 5]
    assert in_two.dataset_lift["one"] == 0 and in_two.dataset_lift["two"] == pytest.approx(2)
    assert max(datasets.drift_over_time) > 0.2 > max(neither.drift_over_time)


def test_experts_that_are_chosen_together_are_found_and_clustered(analysed, rng):
    """Pairs always come from one of four groups of four experts."""
    rows = 400 * WINDOW
    group = rng.integers(0, 4, rows)
    inside = np.argsort(rng.random((rows, 4)), axis=1)[:, :2]
    names = rng.permutation(16)
    ids = names[4 * group[:, None] + inside]
    found = analysed({"one": {"topk_ids": ids[:, None]}}, experts=16, num_clusters=4)
    (layer,) = found.layers
    assert layer.unique_pairs == 4 * 6
    together = {tuple(sorted(names[4 * g : 4 * g + 4])) for g in range(4)}
    for pair in (*layer.top_pairs, *layer.top_lifts):
        assert any(set(pair.experts) <= set(members) for members in together)
        assert pair.lift == pytest.approx(16 / 2 / 3 * 1, rel=0.3) or pair.lift > 2
    (clustering,) = layer.clusters
    assert clustering.source == "co-activation" and clustering.best_num_clusters == 4
    labels = np.array(clustering.labels)
    assert {tuple(np.flatnonzero(labels == label)) for label in range(4)} == together


def test_router_probabilities_give_their_mean_entropy_and_similarity(analysed, rng):
    rows, experts = 100 * WINDOW, 8
    kinds = np.array([[0.5, 0.5, 0, 0, 0, 0, 0, 0], np.full(8, 1 / 8)]) + 1e-9
    which = rng.integers(0, 2, rows)
    probability = kinds[which][:, None]
    ids = np.broadcast_to(np.array([0, 1]), (rows, 1, 2))
    found = analysed(
        {"one": {"topk_ids": ids, "log_probs": np.log(probability)}},
        experts=experts,
        num_clusters=2,
    )
    (layer,) = found.layers
    expected = (1 * (which == 0) + 3 * (which == 1)).mean()
    assert layer.router_entropy == pytest.approx(expected, abs=0.02)


def test_planted_drift_in_text_and_over_time_is_placed(analysed):
    """The first half of each window uses experts 0-3; the last tenth of the samples expert 7."""
    samples = 200
    position = np.tile(np.arange(WINDOW), samples)
    sample = np.repeat(np.arange(samples), WINDOW)
    ids = np.where(position < WINDOW // 2, position % 4, 4 + position % 3)
    ids = np.where(sample >= 180, 7, ids)
    found = analysed({"one": {"topk_ids": ids[:, None, None]}}, top_k=1)
    (layer,) = found.layers
    assert len(layer.drift_in_text) == 8 and len(layer.drift_over_time) == 20
    assert min(layer.drift_in_text) > 0.2
    assert max(layer.drift_over_time[:18]) < 0.1 < 0.5 < min(layer.drift_over_time[18:])
    assert found.coverage_over_time[0] == 7 / 8 and found.coverage_over_time[-1] == 1
    assert found.coverage_over_time == sorted(found.coverage_over_time)


def test_contexts_are_the_places_of_largest_weight(analysed, rng):
    samples = 60
    rows = samples * WINDOW
    weights = rng.uniform(0.01, 0.5, (rows, 1, 1)).astype(np.float16)
    # One document has the largest weights of all, and still gives an expert one place.
    weights[:WINDOW, 0, 0] = 0.9 - 0.02 * np.arange(WINDOW)
    ids = rng.integers(0, 4, (rows, 1, 1))
    tokens = np.arange(rows)
    found = analysed(
        {"one": {"topk_ids": ids, "topk_weights": weights, "token_id": tokens}},
        experts=4,
        top_k=1,
    )
    for expert in found.experts:
        mine = np.flatnonzero(ids[:, 0, 0] == expert.expert_idx)
        best = {}
        for row in mine:  # one place a document, and each sample here is one
            sample, weight = row // WINDOW, float(weights[row, 0, 0])
            if weight > best.get(sample, (0, 0))[0]:
                best[sample] = (weight, row)
        expected = sorted(best.values(), reverse=True)[:5]
        assert [context.weight for context in expert.contexts] == pytest.approx(
            [weight for weight, _ in expected], abs=1e-5
        )
        for context, (_, row) in zip(expert.contexts, expected, strict=True):
            start = row // WINDOW * WINDOW
            assert context.sample_id == row // WINDOW and context.token == f"<{row}>"
            before = range(max(start, row - 12), row)
            assert context.before == " ".join(f"<{token}>" for token in before)
            after = range(row + 1, min(start + WINDOW, row + 13))
            assert context.after == " ".join(f"<{token}>" for token in after)


def test_data_set_figures_and_totals_add_up(analysed, rng):
    parts = {
        "one": {"topk_ids": np.argsort(rng.random((20 * WINDOW, 2, 8)))[..., :2] % 4},
        "two": {"topk_ids": np.argsort(rng.random((10 * WINDOW, 2, 8)))[..., :2]},
    }
    parts["one"]["topk_ids"][..., 1] = 4 + parts["one"]["topk_ids"][..., 0] % 2
    found = analysed(parts, layers=2)
    assert found.traces == 30 and found.tokens == 30 * WINDOW
    assert found.datasets["one"].traces == 20 and found.datasets["two"].tokens == 10 * WINDOW
    pairs = {
        (layer, *sorted(row))
        for layer in range(2)
        for row in parts["one"]["topk_ids"][:, layer].tolist()
    }
    assert found.datasets["one"].unique_pairs == len(pairs)
    assert found.datasets["one"].coverage == pytest.approx(6 / 8)
    assert found.overall.experts_used == 16 and found.overall.experts_per_layer == 8


def test_two_folders_are_analysed_as_one(tmp_path, planted, rng):
    shape = planted.shape()
    ids = np.argsort(rng.random((40 * WINDOW, 2, 8)))[..., :2]
    half = 20 * WINDOW
    planted.write(tmp_path / "A", shape, {"one": {"topk_ids": ids[:half]}}, window=WINDOW)
    planted.write(tmp_path / "B", shape, {"two": {"topk_ids": ids[half:]}}, window=WINDOW)
    parts = {"one": {"topk_ids": ids[:half]}, "two": {"topk_ids": ids[half:]}}
    planted.write(tmp_path / "AB", shape, parts, window=WINDOW)
    apart = analyze(open_traces([tmp_path / "A", tmp_path / "B"]), num_clusters=0)
    together = analyze([TraceReader(tmp_path / "AB")], num_clusters=0)
    # Documents are numbered per folder, so only contexts may differ.
    assert msgspec.structs.replace(apart, experts=[]) == msgspec.structs.replace(
        together, experts=[]
    )


def test_the_document_survives_a_round_trip_and_refuses_others(analysed, rng, tmp_path):
    ids = np.argsort(rng.random((20 * WINDOW, 1, 8)))[..., :2]
    found = analysed({"one": {"topk_ids": ids}})
    write_analysis(found, tmp_path / "a.json")
    assert read_analysis(tmp_path / "a.json") == found
    plain = json.loads((tmp_path / "a.json").read_text())
    assert plain["overall"]["coverage"] == found.overall.coverage
    (tmp_path / "a.json").write_text(json.dumps(plain | {"more": 1}))
    with pytest.raises(TraceError, match="more"):
        read_analysis(tmp_path / "a.json")
    with pytest.raises(TraceError, match="cannot be read"):
        read_analysis(tmp_path / "none.json")


def test_nothing_to_analyse_is_said(tmp_path, planted):
    described = planted.manifest(planted.shape(), {"one": 4}, window=WINDOW)
    from outrider.collect.trace import TraceWriter

    with TraceWriter(tmp_path / "T", described):
        pass
    with pytest.raises(TraceError, match="no finished trace"):
        analyze([TraceReader(tmp_path / "T")])


def test_a_comparison_puts_models_of_different_sizes_on_one_scale(tmp_path, planted, rng):
    found = {}
    for name, experts, top_k in (("small", 8, 2), ("large", 64, 6)):
        ids = np.argsort(rng.random((300 * WINDOW, 1, experts)), axis=-1)[..., :top_k]
        shape = planted.shape(layers=1, experts=experts, top_k=top_k)
        planted.write(tmp_path / name, shape, {"one": {"topk_ids": ids}}, window=WINDOW)
        found[name] = analyze([TraceReader(tmp_path / name)], num_clusters=0)
    small, large = compare(found).rows
    assert (small.num_experts, large.num_experts) == (8, 64)
    assert large.routing_entropy - small.routing_entropy == pytest.approx(3, abs=0.02)
    for row, chance in ((small, 2 / 8), (large, 6 / 64)):
        # Both route at random, so on the common scale they are alike.
        assert row.normalized_entropy == pytest.approx(1, abs=0.01)
        assert row.effective_share == pytest.approx(1, abs=0.01)
        assert row.normalized_concentration == pytest.approx(0, abs=0.05)
        assert row.chance_recall == pytest.approx(chance, abs=1e-4)
        assert row.previous_skill == pytest.approx(0, abs=0.02)
        assert row.frequency_skill == pytest.approx(0, abs=0.03)
        assert row.lru_hit_rate["50%"] == pytest.approx(0.5, abs=0.05)
    assert small.pair_share == 1
    with pytest.raises(CollectError, match="needs two or more"):
        compare({"small": found["small"]})
