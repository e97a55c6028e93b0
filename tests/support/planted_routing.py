"""Routing with known structure, without models or files: bursts of experts that change by topic."""

import numpy as np

from outrider.bench.foretold import Foretold
from outrider.bench.replay import Carriage, StepTimes
from outrider.bench.routing import Routing
from outrider.collect.schema import ModelShape

PROMPT = 2
CARRIAGE = Carriage(expert_bytes=1000, link_bytes_per_s=1e6, latency_s=1e-4)
TIMES = StepTimes(begin_s=1e-4, layer_s=5e-4, expert_s=1e-4, end_s=1e-4)


def routing(
    *, seed: int, sequences: int = 6, length: int = 20, layers: int = 3, experts: int = 12,
    top_k: int = 3,
) -> Routing:  # fmt: skip
    """Each sequence prefers some experts, each token others; two sequences a document."""
    generator = np.random.default_rng(seed)
    num_tokens = sequences * length
    topic = np.repeat(generator.normal(size=(sequences, layers, experts)) * 2.0, length, axis=0)
    words = generator.normal(size=(15, layers, experts)) * 2.0
    token_id = generator.integers(0, 15, num_tokens)
    scores = topic + words[token_id] + generator.gumbel(size=(num_tokens, layers, experts))
    topk_ids = np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.int32)
    return Routing(
        shape=ModelShape(layers, experts, top_k, 8, 4, "planted"),
        offsets=np.arange(0, num_tokens + 1, length),
        document=np.arange(sequences, dtype=np.uint64) // 2,
        token_id=token_id,
        topk_ids=topk_ids,
        topk_weights=np.full(topk_ids.shape, 1.0 / top_k, np.float32),
    )


def foretold(recorded: Routing, *, noise: float, seed: int = 0) -> Foretold:
    """Forecasts that are right but for a share `noise` of the experts; 0 is an oracle."""
    generator = np.random.default_rng(seed)
    shape = recorded.shape
    size = (recorded.num_tokens, shape.num_moe_layers, shape.num_experts)
    truth = np.zeros(size, dtype=np.float32)
    np.put_along_axis(truth, recorded.topk_ids.astype(np.int64), 1.0, axis=2)
    guess = generator.permuted(truth, axis=2)
    is_wrong = generator.random(size[:2]) < noise
    said = np.where(is_wrong[:, :, None], guess, truth) * (1.0 - 0.5 * noise)
    after = np.zeros_like(said)
    after[:-1] = said[1:]
    is_known = np.ones((2, recorded.num_tokens), dtype=bool)
    is_known[1, recorded.offsets[1:] - 1] = False
    return Foretold(
        offsets=recorded.offsets,
        prompt_tokens=PROMPT,
        before=np.stack([said, after]).astype(np.float16),
        is_known=is_known,
        layers={},
    )
