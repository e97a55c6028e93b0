"""The 8-bit log-probability code against float64 arithmetic."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.trace.probability import (
    LOG8_FLOOR,
    decode_log8,
    encode_log8,
    log8_error_bound,
)


def _round_trip(log_probs: np.ndarray) -> np.ndarray:
    return decode_log8(encode_log8(torch.from_numpy(log_probs)).numpy())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(LOG8_FLOOR, 0), min_size=1, max_size=50))
def test_log8_stays_within_the_stated_bound(values):
    log_probs = np.array(values)
    error = np.abs(_round_trip(log_probs).astype(np.float64) - log_probs)
    assert (error <= log8_error_bound(log_probs) + 1e-5).all()


def test_the_bound_is_as_tight_as_the_docstring_says():
    for probability, relative in ((0.9, 0.009), (0.5, 0.0212), (0.01, 0.0545)):
        assert log8_error_bound(np.log(np.array(probability))) <= relative
        # Tight as well: a bound that nothing comes near would promise too little.
        around = np.log(np.linspace(0.97 * probability, min(1, 1.03 * probability), 4001))
        assert np.abs(_round_trip(around) - around).max() > 0.4 * relative


def test_log8_keeps_the_order_and_the_ends():
    log_probs = np.concatenate([-np.logspace(2, -8, 500), [0.0]])
    decoded = _round_trip(log_probs)
    assert (np.diff(decoded) >= 0).all()
    assert decoded[-1] == 0
    assert _round_trip(np.array([-np.inf]))[0] == np.float32(LOG8_FLOOR)


def test_a_distribution_still_sums_to_about_one(rng):
    logits = rng.normal(0, 2, (500, 64))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums = np.exp(_round_trip(log_probs)).sum(-1)
    assert np.abs(sums - 1).max() < 0.03
