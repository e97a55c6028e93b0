"""Measures of counts and distributions, as pure functions on arrays. Entropies and informations in
bits.
"""

from __future__ import annotations

import numpy as np


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over the last axis as a distribution; zeros stay zeros where nothing was counted."""
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total == 0, 1, total)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Shannon entropy of the distribution over the last axis, in bits."""
    share = shares(counts)
    logs = np.log2(share, where=share > 0, out=np.zeros(share.shape))
    # 0.0 added so that an entropy of nothing is not minus zero.
    return -(share * logs).sum(axis=-1) + 0.0


def concentration(counts: np.ndarray) -> np.ndarray:
    """Largest over mean use: 1 where all are used alike, E where one is used alone."""
    mean = counts.mean(axis=-1)
    return counts.max(axis=-1) / np.where(mean == 0, 1, mean)


def gini(counts: np.ndarray) -> np.ndarray:
    """Gini coefficient of use over the last axis: 0 where balanced, (E - 1) / E where one is used
    alone.
    """
    ordered = np.sort(counts, axis=-1)
    number = counts.shape[-1]
    ranks = 2 * np.arange(1, number + 1) - number - 1
    total = counts.sum(axis=-1)
    return (ordered * ranks).sum(axis=-1) / (number * np.where(total == 0, 1, total))


def mutual_information(joint: np.ndarray) -> float:
    """I(row; column) of a matrix of counts, less the bias that a finite sample adds.

    Each plug-in entropy of m used cells falls short by about (m - 1) / (2 N ln 2) (Miller and
    Madow, 1955), which is added to all three; what is left is cut off at 0.
    """
    joint = joint[joint.sum(axis=1) > 0][:, joint.sum(axis=0) > 0].astype(np.float64)
    total = joint.sum()
    if total == 0:
        return 0.0
    plain = entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1)) - entropy(joint.reshape(-1))
    missing = sum(joint.shape) - 1 - np.count_nonzero(joint)
    return float(max(plain + missing / (2 * total * np.log(2)), 0.0))


def conditional_entropy(joint: np.ndarray) -> float:
    """H(column | row) of a matrix of counts: what is still open about the column once the row is
    known.
    """
    return float(entropy(joint.reshape(-1)) - entropy(joint.sum(axis=1)))


def divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two count vectors over the last axis: 0 alike, 1 bit
    disjoint.
    """
    p, q = shares(first), shares(second)
    return np.maximum(entropy(p + q) - (entropy(p) + entropy(q)) / 2, 0.0)


def lift(joint: np.ndarray, tokens: int) -> np.ndarray:
    """How much oftener two experts are chosen for one token than if they were independent, [E, E].

    `joint` has pair counts beside the diagonal and single uses on it; 1 is chance, 0 never. Pairs
    of experts that are never used have 0.
    """
    single = np.diagonal(joint).astype(np.float64)
    expected = np.outer(single, single) / max(tokens, 1)
    return np.where(expected > 0, joint / np.where(expected > 0, expected, 1), 0.0)


def frequency_bound(usage: np.ndarray, top_k: int) -> float:
    """Recall at k of always forecasting the k experts that are used most."""
    total = usage.sum()
    return float(np.sort(usage)[::-1][:top_k].sum() / total) if total else 0.0
