"""How far scores from several sources are to be trusted together: slopes by held-out log loss.

Pure functions of arrays; knows no family.
"""

from collections.abc import Sequence

import numpy as np

from .in_pass import quick_inclusion

NEWTON_ITERATIONS = 8
MAX_ROWS = 6_000
_MAX_STEP = 2.0
_DAMPING = 1e-3


def fit_slopes(sources: Sequence[np.ndarray], used: np.ndarray, *, top_k: int) -> np.ndarray:
    """Slopes [S] by which scores [N, E] of each source are weighed before `quick_inclusion`.

    Logistic regression in which each row has the threshold that makes it sum to top_k. Newton's
    method: raising a slope moves that threshold too, by the mean of the scores weighted by
    p (1 - p), so only what a score has over that mean counts.
    """
    scale = np.array([max(float(one.std()), 1e-6) for one in sources])
    features = np.stack([one / size for one, size in zip(sources, scale, strict=True)], axis=-1)
    slopes = np.full(len(sources), 2.0 / len(sources))
    for _ in range(NEWTON_ITERATIONS):
        probability = quick_inclusion(features @ slopes, top_k).astype(np.float64)
        uncertain = probability * (1.0 - probability)
        mass = np.maximum(uncertain.sum(axis=1), 1e-9)
        mean = np.einsum("ne,nes->ns", uncertain, features) / mass[:, None]
        centred = features - mean[:, None]
        gradient = np.einsum("ne,nes->s", used - probability, centred)
        information = np.einsum("ne,nes,net->st", uncertain, centred, centred, optimize=True)
        information += _DAMPING * len(used) * np.eye(len(slopes))
        step = np.linalg.solve(information, gradient)
        slopes = slopes + np.clip(step, -_MAX_STEP, _MAX_STEP)
    return (slopes / scale).astype(np.float32)


def log_odds_of(probability: np.ndarray, *, floor: float = 1e-4) -> np.ndarray:
    """Log-odds float32 of probabilities, which are kept `floor` away from 0 and 1."""
    kept = np.clip(probability, floor, 1.0 - floor)
    return (np.log(kept) - np.log1p(-kept)).astype(np.float32, copy=False)
