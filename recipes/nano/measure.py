"""What the model card states, measured on a fixed slice of the test documents.

Owns the slice. Knows nothing of how figures are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.runtime.models.deepseek import DeepseekForCausalLM, DeepseekTopKRouter

from .corpus import DOMAINS
from .data import Windows, bytes_per_token

LENGTH = 512
MAX_WINDOWS = 40  # a domain; the smallest test split, code, has about this many


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """One domain's part of the slice."""

    tokens: int
    utf8_bytes: int
    loss: float  # nats a token
    bits_per_byte: float


@torch.no_grad()
def measure(model: DeepseekForCausalLM, tokens: Path) -> tuple[dict[str, DomainFigures], Tensor]:
    """Figures of each domain, and how often each expert was chosen, int64 [MoE layers, E].

    The slice is the first MAX_WINDOWS windows of LENGTH tokens of each domain's test documents, in
    the order of their hash. Blocks for a minute or more.
    """
    windows, token_bytes = Windows(tokens, "test", length=LENGTH), bytes_per_token(tokens)
    routers = [module for module in model.modules() if isinstance(module, DeepseekTopKRouter)]
    usage = torch.zeros(len(routers), model.config.num_experts, dtype=torch.int64)
    hooks = [
        router.register_forward_hook(_counter(usage[layer])) for layer, router in enumerate(routers)
    ]
    figures = {}
    for domain in DOMAINS:
        count = min(MAX_WINDOWS, windows.count(domain))
        nats, num_bytes = 0.0, 0
        for number in range(count):
            window = torch.from_numpy(windows.window(domain, number))
            logits = model(window[None, :-1], use_cache=False).logits[0]
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
            num_bytes += int(token_bytes[window[1:]].sum())
        figures[domain] = DomainFigures(
            tokens=count * LENGTH,
            utf8_bytes=num_bytes,
            loss=nats / (count * LENGTH),
            bits_per_byte=nats / math.log(2) / num_bytes,
        )
    for hook in hooks:
        hook.remove()
    return figures, usage


def _counter(counts: Tensor) -> Callable[[nn.Module, object, tuple[Tensor, Tensor, Tensor]], None]:
    def count(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts.add_(torch.bincount(output[2].flatten(), minlength=len(counts)))

    return count
