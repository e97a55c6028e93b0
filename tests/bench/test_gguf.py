"""The turn of query and key rows: llama.cpp's rotation of turned rows is ours of plain ones."""

import numpy as np

from outrider.bench.llama_gguf import turned


def test_neighbouring_pairs_of_turned_rows_are_the_halves_of_heads() -> None:
    heads, dim = 3, 8
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(heads * dim, 5))
    state, angle = generator.normal(size=5), generator.normal(size=dim // 2)
    plain = (rows @ state).reshape(heads, dim)
    first, second = plain[:, : dim // 2], plain[:, dim // 2 :]
    halves = first * np.cos(angle) - second * np.sin(angle)
    halves_after = second * np.cos(angle) + first * np.sin(angle)
    pairs = (turned(rows, heads) @ state).reshape(heads, dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    np.testing.assert_allclose(even * np.cos(angle) - odd * np.sin(angle), halves)
    np.testing.assert_allclose(odd * np.cos(angle) + even * np.sin(angle), halves_after)
