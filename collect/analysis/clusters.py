"""Groups of experts of one layer: k-means on what they do together, how they are asked, how they
agree.

Judged by silhouette and by how alike the groups are from other random starts. Needs scikit-learn.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import msgspec
import numpy as np

DEFAULT_CLUSTERS = 8
_TRIED = (2, 3, 4, 6, 8, 12, 16)
_SEEDS = 5


class Clustering(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to group a layer's experts.

    `source`: "co-activation" (which experts are chosen together), "router" (rows of the router's
    weight), "similarity" (correlation of router probabilities over tokens). `labels` [E] are the
    groups for `num_clusters`; `silhouette` (-1 to 1) judges it, `silhouettes` other numbers;
    `best_num_clusters` has the largest. `stability` is the mean adjusted Rand index between random
    starts (1: always the same).
    """

    source: str
    num_clusters: int
    labels: list[int]
    silhouette: float
    stability: float
    silhouettes: dict[int, float]
    best_num_clusters: int


def cluster_experts(
    features: np.ndarray, source: str, *, num_clusters: int = DEFAULT_CLUSTERS, seed: int = 0
) -> Clustering | None:
    """Group experts by their rows of `features` [E, F]; None where fewer than 3 experts differ."""
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    distinct = len(np.unique(features, axis=0))
    if distinct < 3:
        return None
    most = min(distinct, len(features)) - 1
    wanted = min(num_clusters, most)
    silhouettes = {}
    for number in sorted({n for n in (*_TRIED, wanted) if n <= most}):
        labels = _fit(features, number, seed=seed)
        silhouettes[number] = round(float(silhouette_score(features, labels)), 4)
    runs = [_fit(features, wanted, seed=seed + run) for run in range(_SEEDS)]
    agreement = [adjusted_rand_score(a, b) for a, b in combinations(runs, 2)]
    return Clustering(
        source=source,
        num_clusters=wanted,
        labels=_by_first_member(runs[0]),
        silhouette=silhouettes[wanted],
        stability=round(float(np.mean(agreement)), 4),
        silhouettes=silhouettes,
        best_num_clusters=max(silhouettes, key=lambda number: silhouettes[number]),
    )


def coactivation_features(joint: np.ndarray) -> np.ndarray:
    """Rows of P(other expert | this expert), [E, E]; an expert's own column says nothing
    and is 0.
    """
    others = joint * (1 - np.eye(len(joint)))
    single = np.diagonal(joint)[:, None]
    return others / np.where(single == 0, 1, single)


def similarity_features(products: np.ndarray, sums: np.ndarray, tokens: int) -> np.ndarray | None:
    """Correlation [E, E] of the experts' router probabilities over tokens; None without any."""
    if tokens == 0:
        return None
    mean = sums / tokens
    covariance = products / tokens - np.outer(mean, mean)
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    scale = np.outer(deviation, deviation)
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0.0)


def router_features(tensors: dict[str, Any], layer_idx: int, num_experts: int) -> np.ndarray | None:
    """Rows of a layer's router weight at length 1, [E, H]; None where it has no such matrix."""
    for name, tensor in tensors.items():
        if name.startswith(f"layer_{layer_idx}.") and ".norm." not in name and tensor.dim() == 2:
            rows = tensor.float().numpy()
            if len(rows) == num_experts:
                lengths = np.linalg.norm(rows, axis=1, keepdims=True)
                return rows / np.where(lengths == 0, 1, lengths)
    return None


def _fit(features: np.ndarray, number: int, *, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    starts: Any = 3  # an int, which the published types do not allow
    return KMeans(number, n_init=starts, random_state=seed).fit_predict(features)


def _by_first_member(labels: np.ndarray) -> list[int]:
    """Groups numbered in the order in which their first expert comes."""
    names: dict[int, int] = {}
    return [names.setdefault(int(label), len(names)) for label in labels]
