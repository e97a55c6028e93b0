"""Sampling against a plain reference, transformers' processors, and properties of its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, currently_in_test_context, given, settings
from hypothesis import strategies as st

from outrider.runtime.errors import OutriderError
from outrider.runtime.request import SamplingParams
from outrider.runtime.sampler import Sampler, largest, nucleus

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def reference_scores(logits, params, prompt, output):
    """Penalised logits, one token after the other."""
    scores = []
    for token_id, logit in enumerate(logits):
        score = float(logit)
        if token_id in prompt or token_id in output:
            rate = params.repetition_penalty
            score = score / rate if score > 0 else score * rate
        count = output.count(token_id)
        score -= params.frequency_penalty * count
        score -= params.presence_penalty * (1 if count else 0)
        scores.append(score)
    return scores


def reference_distribution(logits, params, prompt=(), output=()):
    """token -> probability, in ascending id; each stage renormalises over what is left."""
    scores = reference_scores(logits, params, list(prompt), list(output))
    top = max(scores)
    if params.temperature == 0:
        return {scores.index(top): 1.0}
    mass = {i: math.exp((s - top) / params.temperature) for i, s in enumerate(scores)}

    def ordered():
        return sorted(mass, key=lambda i: (-scores[i], i))

    mass = {i: m for i, m in mass.items() if m >= params.min_p}
    if params.top_k:
        mass = {i: mass[i] for i in ordered()[: params.top_k]}
    if params.top_p < 1:
        total, reached, kept = sum(mass.values()), 0.0, []
        for i in ordered():
            if reached >= params.top_p * total:
                break
            reached += mass[i]
            kept.append(i)
            # Where the sum meets top_p to the last bit, either set is right.
            if currently_in_test_context():
                assume(abs(reached - params.top_p * total) > 1e-9)
        mass = {i: mass[i] for i in kept}
    total = sum(mass.values())
    return {i: mass[i] / total for i in sorted(mass) if mass[i] > 0}


def draw_many(params, logits, count, *, prompt=()):
    """`count` draws at the same position: the state's tokens are not counted (no penalties)."""
    sampler = Sampler(params, vocab_size=len(logits))
    state = sampler.begin(prompt)
    return [sampler.sample(logits, state).token_id for _ in range(count)]


# On a grid, so that equal logits are common, as they are in bf16, and unequal ones stay unequal.
values = st.one_of(
    st.integers(-4, 4).map(float),
    st.integers(-480, 480).map(lambda number: number / 16),
    st.just(-math.inf),
)
logit_lists = st.lists(values, min_size=1, max_size=10).filter(
    lambda items: any(math.isfinite(item) for item in items)
)


@st.composite
def sampling_params(draw, *, penalties=True):
    number = draw(st.integers(0, 2**16))
    params = {
        "seed": number,
        "temperature": draw(st.sampled_from([0.0, 1e-310, 0.3, 1.0, 2.5, 100.0])),
        "top_k": draw(st.integers(0, 12)),
        "top_p": draw(st.one_of(st.just(1.0), st.floats(0.01, 0.999))),
        "min_p": draw(st.sampled_from([0.0, 0.0501, 0.4037, 1.0])),
    }
    if penalties:
        params |= {
            "repetition_penalty": draw(st.sampled_from([1.0, 1.37, 0.71])),
            "frequency_penalty": draw(st.sampled_from([0.0, 0.53, -0.77])),
            "presence_penalty": draw(st.sampled_from([0.0, 0.91, -1.3])),
        }
    return SamplingParams(**params)


def test_a_presence_penalty_is_taken_in_double_precision():
    params = SamplingParams(
        temperature=0.0, presence_penalty=-1.3, frequency_penalty=0.53, repetition_penalty=0.71
    )
    sampler = Sampler(params, vocab_size=2)
    state = sampler.begin()
    tokens = [sampler.sample(torch.tensor([-1.0, -1.0]), state).token_id for _ in range(4)]
    # After three of token 0 the two differ in the last bits of a double only.
    assert tokens == [0, 0, 0, 0]


@settings(relaxed, max_examples=150)
@given(logit_lists, sampling_params(), st.data())
def test_sequence_of_tokens_is_that_of_the_reference(logits, params, data):
    token_ids = st.lists(st.integers(0, len(logits) - 1), max_size=5)
    prompt = data.draw(token_ids)
    sampler = Sampler(params, vocab_size=len(logits))
    state = sampler.begin(prompt)
    numbers = torch.Generator().manual_seed(params.seed or 0)
    output: list[int] = []
    for _ in range(4):
        expected = reference_distribution(logits, params, prompt, output)
        token_id = sampler.sample(torch.tensor(logits), state).token_id
        if params.is_greedy:
            assert token_id == next(iter(expected))
        else:
            # The one number of this token, looked up in the reference's cumulative distribution.
            uniform = float(torch.rand((), generator=numbers, dtype=torch.float64))
            reached = np.cumsum(list(expected.values()))
            assume(np.abs(reached[:-1] - uniform).min(initial=1.0) > 1e-9)
            position = min(int((reached <= uniform).sum()), len(reached) - 1)
            assert token_id == list(expected)[position]
        output.append(token_id)


@relaxed
@given(logit_lists, sampling_params(penalties=False))
def test_only_tokens_of_the_truncated_set_are_drawn(logits, params):
    allowed = reference_distribution(logits, params)
    drawn = draw_many(params, torch.tensor(logits), 40)
    assert set(drawn) <= set(allowed)
    if params.top_k:
        assert len(set(drawn)) <= params.top_k


@relaxed
@given(logit_lists, st.integers(1, 12))
def test_largest_is_a_stable_sort(logits, count):
    count = min(count, len(logits))
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]
    assert largest(torch.tensor(logits), count).tolist() == expected


@relaxed
@given(st.lists(st.floats(-20, 0), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_nucleus_is_the_smallest_set_that_suffices(scores, top_p):
    kept = nucleus(torch.tensor(scores, dtype=torch.float64), top_p).tolist()
    weights = [math.exp(score) for score in scores]
    target = top_p * math.fsum(weights)
    assert len(kept) >= 1
    assert math.fsum(weights[i] for i in kept) >= target * (1 - 1e-12)
    assert math.fsum(weights[i] for i in kept[:-1]) < target * (1 + 1e-12)
    left = [weights[i] for i in range(len(scores)) if i not in kept]
    assert max(left, default=0.0) <= weights[kept[-1]]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("levels", [None, 40], ids=["distinct", "many-ties"])
def test_nucleus_of_a_large_vocabulary_needs_no_full_sort_to_be_right(top_p, levels):
    scores = torch.randn(30_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if levels:
        scores = (scores * levels / 4).round() * 4 / levels
    scores -= scores.max()
    order = np.lexsort((np.arange(len(scores)), -scores.numpy()))
    cumulative = np.cumsum(np.exp(scores.numpy()[order]))
    needed = int((cumulative < top_p * cumulative[-1]).sum()) + 1
    assert nucleus(scores, top_p).tolist() == order[:needed].tolist()


def chi_square(counts, probabilities, total):
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in probabilities.items())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.83},
        {"min_p": 0.11, "temperature": 1.3},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.03, "temperature": 1.2},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params):
    logits = torch.tensor([1.0, 0.2, -0.5, 1.5, 0.0, -2.0, 0.9, 0.4])
    params = SamplingParams(seed=3, **params)
    expected = reference_distribution(logits.tolist(), params)
    total = 1500
    drawn = draw_many(params, logits, total)
    counts = {i: drawn.count(i) for i in range(8)}
    assert sum(counts[i] for i in expected) == total
    # 1 - 1e-6 quantiles of chi-square with 1 to 7 degrees of freedom.
    limits = [0.0, 23.9, 27.6, 30.7, 33.4, 35.9, 38.3, 40.5]
    assert chi_square(counts, expected, total) < limits[len(expected) - 1]
    # The same bound sees a distribution that is off by a temperature of 1.2.
    flatter = reference_distribution(
        logits.tolist(), SamplingParams(temperature=params.temperature * 1.2)
    )
    flatter = {i: flatter[i] / sum(flatter[j] for j in expected) for i in expected}
    assert chi_square(counts, flatter, total) > chi_square(counts, expected, total)


def test_same_seed_same_tokens_whatever_else_happens():
    logits = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(30)]

    def tokens(seed, *, disturbed=False):
        sampler = Sampler(SamplingParams(seed=seed), vocab_size=50)
        state = sampler.begin()
        other = Sampler(SamplingParams(seed=seed + 1), vocab_size=50)
        other_state = other.begin()
        result = []
        for step in logits:
            if disturbed:
                torch.manual_seed(0)
                torch.rand(3)
                other.sample(step, other_state)
            result.append(sampler.sample(step, state).token_id)
        return result

    assert tokens(7) == tokens(7) == tokens(7, disturbed=True)
    assert tokens(7) != tokens(8)


def test_sampling_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    draw_many(SamplingParams(seed=1), torch.zeros(5), 10)
    draw_many(SamplingParams(), torch.zeros(5), 10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_without_seed_runs_differ():
    logits = torch.zeros(1000)
    params = SamplingParams()
    assert draw_many(params, logits, 20) != draw_many(params, logits, 20)


def test_seed_is_read_the_same_with_and_without_truncation_that_removes_nothing():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    plain = draw_many(SamplingParams(seed=5), logits, 50)
    assert plain == draw_many(SamplingParams(seed=5, top_k=40), logits, 50)
    assert plain == draw_many(SamplingParams(seed=5, min_p=1e-30), logits, 50)


@relaxed
@given(logit_lists)
def test_greedy_takes_the_lowest_of_equal_ids(logits):
    expected = logits.index(max(logits))
    tensor = torch.tensor(logits)
    assert draw_many(SamplingParams(temperature=0), tensor, 2) == [expected] * 2
    assert draw_many(SamplingParams(temperature=0), tensor.double(), 1) == [expected]
    # top_k 1 is greedy at any temperature, and a set of one needs no luck.
    assert draw_many(SamplingParams(top_k=1, temperature=50), tensor, 2) == [expected] * 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_tiny_temperature_draws_only_the_largest(temperature):
    logits = torch.tensor([1.0, 3.0, 3.0, 2.999, -math.inf])
    drawn = draw_many(SamplingParams(temperature=temperature, seed=1), logits, 60)
    assert set(drawn) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_of_any_float_type_are_left_as_they_are(dtype):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = logits.clone()
    params = SamplingParams(
        seed=2, top_p=0.9, repetition_penalty=1.2, presence_penalty=1, logprobs=3
    )
    sampler = Sampler(params, vocab_size=64)
    state = sampler.begin([1, 2])
    for _ in range(3):
        sampler.sample(logits, state)
    assert torch.equal(logits, kept)
    assert logits.dtype == dtype


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"presence_penalty": 1}], ids=str)
@pytest.mark.parametrize(
    "logits",
    [[math.nan] * 3, [1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [-math.inf] * 3],
    ids=["all-nan", "one-nan", "one-inf", "all-masked"],
)
def test_unusable_logits_are_an_error_not_a_token(params, logits):
    with pytest.raises(OutriderError, match="unusable"):
        draw_many(SamplingParams(**params), torch.tensor(logits), 1)


def test_logits_of_another_shape_are_refused():
    sampler = Sampler(SamplingParams(), vocab_size=5)
    for shape in ((4,), (1, 5), ()):
        with pytest.raises(ValueError, match="shape"):
            sampler.sample(torch.zeros(shape), sampler.begin())


def test_state_of_a_sampler_without_penalties_is_refused_by_one_with():
    with pytest.raises(ValueError, match="penalties"):
        Sampler(SamplingParams(presence_penalty=1), vocab_size=2).sample(
            torch.zeros(2), Sampler(SamplingParams(), vocab_size=2).begin()
        )


def test_penalties_count_prompt_and_output_each_in_its_way():
    def tokens(count, **penalties):
        params = SamplingParams(temperature=0, **penalties)
        sampler = Sampler(params, vocab_size=3)
        state = sampler.begin([0])
        return [sampler.sample(torch.tensor([4.0, 3.0, 2.5]), state).token_id for _ in range(count)]

    # Presence and frequency look at the output only: token 0 goes first although it was prompted.
    assert tokens(4, presence_penalty=1.2) == [0, 1, 0, 0]
    assert tokens(5, frequency_penalty=0.6) == [0, 0, 1, 0, 2]
    # Repetition looks at the prompt too: 4 / 1.5 < 3.
    assert tokens(3, repetition_penalty=1.5) == [1, 0, 0]


@relaxed
@given(logit_lists, st.integers(0, 20), st.data())
def test_logprobs_are_those_of_the_model(logits, num_top, data):
    params = data.draw(sampling_params())
    params = SamplingParams(temperature=params.temperature, top_k=params.top_k, logprobs=num_top)
    sampler = Sampler(params, vocab_size=len(logits))
    sampled = sampler.sample(torch.tensor(logits), sampler.begin())
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    assert sampled.logprob == pytest.approx(logits[sampled.token_id] - norm, abs=1e-9)
    finite = [i for i in range(len(logits)) if logits[i] > -math.inf]
    order = sorted(finite, key=lambda i: (-logits[i], i))[:num_top]
    assert [token_id for token_id, _ in sampled.top_logprobs] == order
    for token_id, logprob in sampled.top_logprobs:
        assert logprob == pytest.approx(logits[token_id] - norm, abs=1e-9)


def test_logprobs_that_round_to_the_same_keep_the_order_of_the_logits():
    sampler = Sampler(SamplingParams(temperature=0, logprobs=2), vocab_size=2)
    sampled = sampler.sample(torch.tensor([-1e-30, 0.0]), sampler.begin())
    assert [token_id for token_id, _ in sampled.top_logprobs] == [1, 0]


def test_no_logprobs_unless_asked():
    sampler = Sampler(SamplingParams(), vocab_size=3)
    sampled = sampler.sample(torch.zeros(3), sampler.begin())
    assert (sampled.logprob, sampled.top_logprobs) == (None, ())


@pytest.fixture(scope="module")
def processors():
    """transformers' own logits processors, an independent reading of the same names."""
    return pytest.importorskip("transformers.generation.logits_process")


def test_truncation_and_repetition_agree_with_transformers(processors):
    generator = torch.Generator().manual_seed(4)
    for trial in range(40):
        logits = torch.randn(1, 300, generator=generator, dtype=torch.float64) * 3
        prompt = torch.randint(0, 300, (1, 40), generator=generator)
        top_k, top_p, min_p = 1 + trial * 7, (trial + 0.5) / 41, (trial + 0.5) / 60
        temperature, rate = 0.2 + trial / 13, 0.6 + trial / 30

        def kept(processor, scores):
            return set(torch.isfinite(processor(None, scores)[0]).nonzero().flatten().tolist())

        assert kept(processors.TopKLogitsWarper(top_k), logits) == set(
            largest(logits[0], top_k).tolist()
        )
        shifted = logits[0] - logits.max()
        assert kept(processors.TopPLogitsWarper(top_p), logits) == set(
            nucleus(shifted, top_p).tolist()
        )

        chain = [
            processors.RepetitionPenaltyLogitsProcessor(rate),
            processors.TemperatureLogitsWarper(temperature),
            processors.MinPLogitsWarper(min_p),
            processors.TopKLogitsWarper(top_k),
            processors.TopPLogitsWarper(top_p),
        ]
        scores = logits
        for processor in chain:
            scores = processor(prompt, scores)
        cumulative = scores[0].softmax(0).cumsum(0)
        params = SamplingParams(
            seed=trial,
            repetition_penalty=rate,
            temperature=temperature,
            min_p=min_p,
            top_k=top_k,
            top_p=top_p,
        )
        sampler = Sampler(params, vocab_size=300)
        token_id = sampler.sample(logits[0], sampler.begin(prompt[0].tolist())).token_id
        uniform = torch.rand(
            (), generator=torch.Generator().manual_seed(trial), dtype=torch.float64
        )
        assert token_id == int((cumulative <= uniform).sum())
