"""A short soak among the slow tests; `make soak` is the long one."""

import pytest
import soak


@pytest.mark.slow
def test_a_minute_of_a_crowd_loses_and_leaks_nothing():
    report = soak.soak(seconds=60, num_clients=100)
    assert report["failures"] == [], report
    assert report["requests"] > 500


def test_a_leak_is_a_failure():
    flat = [{"time_s": t, "rss_bytes": 1e8 + (-1) ** t * 1e6} for t in range(100)]
    leaking = [one | {"rss_bytes": one["rss_bytes"] + 1e6 * one["time_s"]} for one in flat]
    assert soak.gain(flat, "rss_bytes") < soak.MAX_GAIN["rss_bytes"]
    assert soak.gain(leaking, "rss_bytes") > soak.MAX_GAIN["rss_bytes"]
