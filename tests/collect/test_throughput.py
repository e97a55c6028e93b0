"""How fast traces are taken and how large they are, on the built-in model; `make test-slow` runs
it.
"""

import statistics
import sys
import time

import numpy as np
import pytest
import torch

from outrider.collect import CollectSettings, TraceReader, collect, open_corpora
from outrider.collect.analysis import analyze
from outrider.collect.routers import decoder
from outrider.collect.sampling import choose_samples
from outrider.runtime.config import EngineConfig
from outrider.runtime.models.loading import resolve_folder
from outrider.runtime.traced import open_traced

TRACES, BATCH_SIZE, ROUNDS = 480, 16, 3


@pytest.mark.slow
@pytest.mark.skipif(
    not (resolve_folder(None) / "model.safetensors").exists(), reason="no built-in model yet"
)
def test_2500_traces_a_minute_at_most_a_tenth_slower_than_bare_passes(tmp_path, capsys):
    """Bare passes and collection alternate, so that both see the same machine."""
    with open_traced(None, EngineConfig()) as traced:
        corpora = open_corpora(["speeches", "code"])
        samples = choose_samples(
            corpora, traced.tokenizer, traces=TRACES, context_tokens=64, seed=0
        )
        batches = [
            torch.from_numpy(chosen.token_ids[first : first + BATCH_SIZE].astype(np.int64))
            for chosen in samples
            for first in range(0, len(chosen), BATCH_SIZE)
        ]
        collected, bare, analysed, nbytes = [], [], [], 0
        for turn in range(ROUNDS + 1):
            began = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    decoder(traced.model)(input_ids=batch, use_cache=False)
            middle = time.perf_counter()
            report = collect(
                traced.model,
                traced.tokenizer,
                corpora,
                shape=traced.shape,
                out=tmp_path / str(turn),
                settings=CollectSettings(
                    TRACES, batch_size=BATCH_SIZE, seed=0, hidden_states="none"
                ),
                model_name="nano",
                model_format=traced.format,
            )
            done = time.perf_counter()
            analyze([TraceReader(tmp_path / str(turn))], num_clusters=0)
            if turn:  # the first round warms up
                bare.append(middle - began)
                collected.append(report.seconds)
                analysed.append(time.perf_counter() - done)
                nbytes = report.nbytes
    overhead = statistics.median(c / b for c, b in zip(collected, bare, strict=True)) - 1
    seconds = statistics.median(c + a for c, a in zip(collected, analysed, strict=True))
    a_minute, a_trace = 60 * TRACES / seconds, nbytes / TRACES
    with capsys.disabled():
        sys.stdout.write(
            f"\n{a_minute:.0f} traces a minute with analysis ({torch.get_num_threads()} threads), "
            f"{overhead:.1%} over bare passes, {a_trace:.0f} bytes a trace\n"
        )
    assert a_minute >= 2500
    assert overhead <= 0.10
    assert 20_000 * a_trace < 650e6


@pytest.mark.slow
@pytest.mark.skipif(
    not (resolve_folder(None) / "model.safetensors").exists(), reason="no built-in model yet"
)
def test_traces_without_log_probabilities_stay_below_250_megabytes(tmp_path):
    with open_traced(None, EngineConfig()) as traced:
        report = collect(
            traced.model,
            traced.tokenizer,
            open_corpora(["speeches", "code"]),
            shape=traced.shape,
            out=tmp_path / "T",
            settings=CollectSettings(200, hidden_states="none", probabilities="none"),
            model_name="nano",
            model_format=traced.format,
        )
    assert 20_000 * report.nbytes / 200 < 250e6
