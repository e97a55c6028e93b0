"""transformers with accelerate's disk offload as an arm: what a user has without outrider."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..runtime.config import EngineConfig
from ..runtime.models.loading import load_tokenizer, resolve_folder
from ..runtime.traced import TracedModel, open_traced
from .arm import read_bytes, rss_peak_bytes
from .bandwidth import drop_page_cache
from .records import External, Measurement, Passage, Recording


class AccelerateArm:
    """The checkpoint as transformers loads it, layers beyond `memory_bytes` on disk.

    The offloaded copy lies in a temporary folder (TMPDIR) and is as large as what is offloaded.
    """

    def __init__(self, *, model: str | None, dtype: str, memory_bytes: int) -> None:
        self._name = model
        self._dtype = dtype
        self._memory_bytes = memory_bytes
        self._opened: TracedModel | None = None

    def load(self) -> External:
        """Load and offload. Blocks for as long as writing the offloaded part takes."""
        import accelerate

        began = time.perf_counter()
        config = EngineConfig(device="cpu", dtype=self._dtype)  # type: ignore[arg-type]
        self._opened = open_traced(self._name, config, max_memory={"cpu": self._memory_bytes})
        return External(
            version=accelerate.__version__,
            load_s=time.perf_counter() - began,
            files=[str(file) for file in self._files()],
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of a prompt."""
        tokenizer = load_tokenizer(resolve_folder(self._name))
        return [list(tokenizer(text)["input_ids"]) for text in texts]

    def record(self, passages: list[Passage]) -> Recording:
        """The tokens chosen, which is a run whose time nobody looks at."""
        return Recording([self._decode(passage)[0] for passage in passages], "", [])

    def prepare(self, is_cold: bool) -> float:
        """Cold: the pages of the checkpoint and of the offloaded copy are given back."""
        return drop_page_cache(self._files()) if is_cold else 0.0

    def run(self, passages: list[Passage]) -> Measurement:
        """Decode every passage once, one after the other, and time it."""
        before = read_bytes()
        runs = [self._decode(passage) for passage in passages]
        return Measurement(
            token_ids=[ids for ids, _, _ in runs],
            decode_tokens=sum(len(ids) - 1 for ids, _, _ in runs),
            decode_s=sum(seconds for _, seconds, _ in runs),
            ttft_s=median(first for _, _, first in runs),
            stall_s=0.0,
            traffic={},
            rss_peak_bytes=rss_peak_bytes(),
            read_bytes=read_bytes() - before,
        )

    def close(self) -> None:
        """Free the model and its folder; idempotent."""
        if self._opened is not None:
            self._opened.resources.close()
            self._opened = None

    @torch.inference_mode()
    def _decode(self, passage: Passage) -> tuple[list[int], float, float]:
        assert self._opened is not None, "load comes first"
        model: Any = self._opened.model
        began = time.perf_counter()
        output = model(torch.tensor([passage.prompt_ids]), use_cache=True)
        chosen = [int(output.logits[0, -1].argmax())]
        first_s = time.perf_counter() - began
        began = time.perf_counter()
        while len(chosen) < passage.num_tokens:
            place = len(chosen) - 1
            fed = passage.text_ids[place] if passage.text_ids else chosen[place]
            output = model(
                torch.tensor([[fed]]), past_key_values=output.past_key_values, use_cache=True
            )
            chosen.append(int(output.logits[0, -1].argmax()))
        return chosen, time.perf_counter() - began, first_s

    def _files(self) -> list[Path]:
        assert self._opened is not None, "load comes first"
        hook = getattr(self._opened.model, "_hf_hook", None)
        folder = getattr(getattr(hook, "weights_map", None), "save_folder", None)
        files = [*resolve_folder(self._name).glob("*.safetensors")]
        return files + ([] if folder is None else [*Path(folder).glob("*.dat")])
