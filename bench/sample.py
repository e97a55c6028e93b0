"""Traces of the built-in model on the repository's own text, for runs that were given none."""

from pathlib import Path

from ..collect import CollectSettings, TraceReader, open_corpora
from ..collect import collect as collect_traces
from ..runtime.config import EngineConfig
from ..runtime.traced import open_traced

NUM_TRACES = 640
"""About 40,000 tokens, of which some 1,500 are of documents held out; half a minute."""

CONTEXT_TOKENS = 64


def collect_sample(folder: Path, *, seed: int, num_traces: int = NUM_TRACES) -> Path:
    """Collect `num_traces` windows of the sample corpus into `folder`; returns it. Blocks.

    Keeps the router inputs of all layers, which look-ahead predictors read.
    """
    engine = EngineConfig(predictor="none", prefetch="off", device="cpu")
    settings = CollectSettings(
        traces=num_traces,
        context_tokens=CONTEXT_TOKENS,
        batch_size=None,
        hidden_states="all",
        probabilities="none",
        seed=seed,
    )
    with open_traced(None, engine) as traced:
        collect_traces(
            traced.model,
            traced.tokenizer,
            open_corpora(["offline"]),
            shape=traced.shape,
            out=folder,
            settings=settings,
            model_name=traced.name,
            model_format=traced.format,
        )
    assert TraceReader(folder).num_samples
    return folder
