"""The engine by itself, a request at a time: what a server is compared with.

An arm of `worker`: the server's configuration, without a socket or another thread.
"""

import time
from pathlib import Path
from typing import Any

from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.prompt import encode_text
from ..runtime.request import GenerationRequest


class AloneArm:
    """Blocks in every call. Errors are OutriderErrors."""

    def __init__(self, *, model: str | None, options: dict[str, Any], store: str | None) -> None:
        self._engine = Engine.from_config(
            EngineConfig(**options), model=model, store=None if store is None else Path(store)
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encode_text(self._engine.tokenizer, text) for text in texts]

    def measure(self, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
        """Generate greedily: `times_s` of every token since the call, and `token_ids`."""
        request = GenerationRequest(
            prompt_token_ids=prompt_ids, max_tokens=num_tokens, temperature=0.0, ignore_eos=True
        )
        began = time.perf_counter()
        sequence = self._engine.submit(request, prompt_token_ids=prompt_ids)
        times: list[float] = []
        while not sequence.is_finished:
            self._engine.step()
            if sequence.error is not None:
                raise sequence.error
            if len(sequence.token_ids) > len(times):
                times.append(time.perf_counter() - began)
        return {"times_s": times, "token_ids": list(sequence.token_ids)}

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()
