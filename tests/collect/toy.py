"""A tiny Mixture-of-Experts model and a word tokenizer in plain PyTorch: no transformers import."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from outrider.collect import CollectSettings, ModelShape, collect
from outrider.collect.corpora.corpus import Corpus

VOCABULARY = 997
SHAPE = ModelShape(
    num_moe_layers=3, num_experts=12, top_k=3, hidden_size=16, expert_size=8, fingerprint="toy-0"
)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))
        self.variance_epsilon = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )


class Router(nn.Module):
    """Unsorted top-k, as the routers of deepseek_v3 and glm4 return it."""

    def __init__(self, experts: int, top_k: int, size: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(x, self.weight)
        weights, ids = logits.softmax(-1).topk(self.top_k, dim=-1)
        flip = torch.arange(self.top_k - 1, -1, -1)
        return logits, weights[:, flip], ids[:, flip]


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = Norm(shape.hidden_size)
        self.router = Router(shape.num_experts, shape.top_k, shape.hidden_size)
        self.experts = nn.Parameter(
            torch.randn(shape.num_experts, shape.hidden_size, shape.hidden_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.norm(x).reshape(-1, x.shape[-1])
        _, weights, ids = self.router(flat)
        outputs = torch.einsum("th,tkhi->tki", flat, self.experts[ids])
        return x + torch.tanh((outputs * weights[..., None]).sum(1)).reshape(x.shape)


class ToyMoe(nn.Module):
    """Causal by a running mean; `max_batch` makes larger batches run out of memory."""

    def __init__(self, shape: ModelShape = SHAPE, *, seed: int = 0, max_batch: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_moe_layers))
        self.max_batch = max_batch
        self.batch_sizes: list[int] = []
        self.eval()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor:
        self.batch_sizes.append(len(input_ids))
        x = self.embedding(input_ids)
        for layer in self.layers:
            steps = torch.arange(1, x.shape[1] + 1)[:, None]
            x = layer(x + x.cumsum(1) / steps)
            if len(input_ids) > self.max_batch:
                raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return x


class Encoding(dict):
    is_fast = True

    def __init__(self, ids: list[list[int]], starts: list[list[int]]) -> None:
        super().__init__(input_ids=ids)
        self._starts = starts

    def token_to_chars(self, row: int, token: int) -> slice:
        return slice(self._starts[row][token], None)


class WordTokenizer:
    """One token a word: w17 is token 17; anything else hashes by length."""

    pad_token_id = 0

    def __init__(self, prefix: tuple[int, ...] = ()) -> None:
        self.prefix = list(prefix)

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, **options: object
    ) -> Encoding:
        texts = [text] if isinstance(text, str) else text
        ids, starts = [], []
        for one in texts:
            words, at, places = one.split(), 0, []
            for word in words:
                at = one.index(word, at)
                places.append(at)
                at += len(word)
            row = [int(w[1:]) if w[1:].isdigit() else len(w) for w in words]
            ids.append([*self.prefix, *row] if add_special_tokens else row)
            starts.append(places)
        if isinstance(text, str):
            return Encoding(ids[0], starts)  # type: ignore[arg-type]
        return Encoding(ids, starts)


def corpus(name: str, *, documents: int, words: int, first: int = 0) -> Corpus:
    """Documents of pseudo-random words; the same for the same name."""

    def texts() -> Iterator[str]:
        state = sum(map(ord, name)) + first
        for number in range(documents):
            row = []
            for _ in range(words + number % 7):
                state = (state * 1103515245 + 12345) % 2**31
                row.append(f"w{(state >> 8) % VOCABULARY}")
            yield " ".join(row)

    return Corpus(name, f"toy:{name}", texts)


def collect_slowly(out: Path, *, traces: int, seed: int, pause_s: float, resume: bool) -> None:
    """A collection that waits after each batch, so that it can be killed in the middle."""
    torch.set_num_threads(1)
    collect(
        ToyMoe(),
        WordTokenizer(),
        [corpus("alpha", documents=40, words=70), corpus("beta", documents=30, words=50)],
        shape=SHAPE,
        out=out,
        settings=CollectSettings(
            traces=traces, context_tokens=24, batch_size=4, seed=seed, samples_per_shard=8
        ),
        model_name="toy",
        model_format="fp32",
        resume=resume,
        progress=lambda progress: time.sleep(pause_s),
    )
