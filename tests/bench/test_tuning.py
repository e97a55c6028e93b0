"""Block sizes for one's own card: the search, its file, and that the runtime takes it up.

No GPU is needed and none has run this: times come from the test.
"""

import json

import pytest
import torch

from outrider.bench.tuning import TuningError, candidates, fastest
from outrider.kernels import blocks
from outrider.kernels.blocks import (
    TABLE,
    Blocks,
    block_sizes,
    load_table,
    save_table,
    table_key,
    use_table,
)
from outrider.runtime.tuned_blocks import tuned_table, use_tuned_blocks

CPU = torch.device("cpu")
KEY = table_key("gathered", "int8", 2048, 0)
SHIPPED = load_table(TABLE)[table_key("gathered", "int8", 0, "any")]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path))
    yield
    use_table({})


def _in_use():
    return block_sizes("gathered", "int8", 2048, device=CPU)


def _silent(what, done, total):
    assert 0 <= done <= total, what


def test_the_fastest_right_candidate_wins_and_each_is_in_use_while_it_is_timed():
    wanted = Blocks(16, 256, num_warps=8, num_stages=2)
    seen = []

    def seconds():
        seen.append(_in_use())
        if seen[-1].block_n == 32:
            return None  # the fastest, were it right
        return 1.0 if seen[-1] == wanted else 2.0

    assert fastest("gathered", KEY, SHIPPED, seconds, progress=_silent) == wanted
    assert seen == [SHIPPED, *candidates("gathered")]
    assert _in_use() == SHIPPED


def test_shipped_sizes_stay_where_nothing_is_faster():
    chosen = fastest("gathered", KEY, SHIPPED, lambda: 1.0, progress=_silent)
    assert chosen == SHIPPED


def test_no_right_candidate_is_an_error():
    with pytest.raises(TuningError, match="no block sizes gave a right result"):
        fastest("gathered", KEY, SHIPPED, lambda: None, progress=_silent)


@pytest.mark.parametrize("op", ["gathered", "grouped"])
def test_candidates_are_sizes_that_a_launch_takes(op):
    chosen = list(candidates(op))
    assert len(set(chosen)) == len(chosen) > 20
    for one in chosen:
        one.check()


def test_the_runtime_puts_measured_sizes_before_the_shipped_ones_for_that_length_only():
    assert use_tuned_blocks() == 0
    measured = Blocks(32, 1024, num_warps=2)
    tuned_table().parent.mkdir(parents=True, exist_ok=True)
    save_table(tuned_table(), {KEY: measured})
    assert use_tuned_blocks() == 1
    assert _in_use() == measured
    assert block_sizes("gathered", "int8", 1408, device=CPU) == SHIPPED


@pytest.mark.parametrize(
    "text",
    ["not json", "[]", '{"a": 1}', json.dumps({KEY: {"block_n": 3, "block_k": 64}})],
    ids=["not-json", "a-list", "no-sizes", "no-power-of-two"],
)
def test_a_damaged_file_costs_a_warning_and_changes_nothing(text, caplog):
    tuned_table().parent.mkdir(parents=True, exist_ok=True)
    tuned_table().write_text(text)
    assert use_tuned_blocks() == 0
    assert "not a table of block sizes" in caplog.text
    assert _in_use() == SHIPPED
    assert blocks._measured == {}
