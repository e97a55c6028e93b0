"""Tiny models shared by a session, engines over them, and the logits of every pass they make."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepseek_reference
import families
import numpy as np
import pytest
import torch

from outrider.predictors.base import Forecast, StepCount
from outrider.runtime.config import EngineConfig
from outrider.runtime.engine import Engine
from outrider.runtime.experts.cache import Kind
from outrider.runtime.models.loading import LoadedModel, load_model, load_tokenizer
from outrider.runtime.scheduler import BatchLimits
from outrider.runtime.testing import ManualTransfer
from outrider.runtime.tier import build_tier, expert_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Generated:
    """What an engine made of prompts: token ids each, and the logits of every pass."""

    token_ids: list[list[int]]
    logits: list[torch.Tensor]
    traffic: Any


class Models:
    """Checkpoints, loaded models and references by family and dtype, each made once a session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoints: dict[Any, Path] = {}
        self._loaded: dict[Any, LoadedModel] = {}
        self._references: dict[Any, Any] = {}

    def checkpoint(self, family: str, *, dtype: str = "fp32", **fields: Any) -> Path:
        """A folder that tests must not change."""
        key = (family, dtype, repr(sorted(fields.items())))
        if key not in self._checkpoints:
            folder = self._folder / f"{family}-{dtype}-{len(self._checkpoints)}"
            families.make_checkpoint(folder, family, dtype=DTYPES[dtype], **fields)
            self._checkpoints[key] = folder
        return self._checkpoints[key]

    def loaded(self, family: str, *, dtype: str = "fp32", **fields: Any) -> LoadedModel:
        """The dense weights; an engine over it takes it over from the one before."""
        folder = self.checkpoint(family, dtype=dtype, **fields)
        if folder not in self._loaded:
            self._loaded[folder] = load_model(folder)
        return self._loaded[folder]

    @contextmanager
    def engine(
        self,
        family: str,
        *,
        dtype: str = "fp32",
        fields: dict[str, Any] | None = None,
        num_slots: int | None = None,
        make_predictor: Any = None,
        is_instant: bool = False,
        limits: BatchLimits | None = None,
        **options: Any,
    ) -> Iterator[Engine]:
        """An engine over the shared model; `num_slots` instead of a budget if it is given.

        `is_instant`: prefetches are done when they are submitted, whatever the disk's speed.
        """
        loaded = self.loaded(family, dtype=dtype, **(fields or {}))
        source = expert_source(loaded, options.get("format", "auto"))
        if num_slots is not None:
            options["expert_memory"] = num_slots * source.nbytes
        config = EngineConfig(**{"expert_memory": "all", **options})
        with pytest.MonkeyPatch.context() as patch:
            if is_instant:
                patch.setattr("outrider.runtime.tier.ThreadTransfer", InstantTransfer)
            tier = build_tier(loaded, config, source=source)
        if make_predictor is not None:
            tier.make_predictor = lambda: make_predictor(loaded)
        tokenizer = load_tokenizer(loaded.folder)
        with Engine(loaded, tier, config=config, tokenizer=tokenizer, limits=limits) as engine:
            yield engine

    def reference(self, family: str, *, dtype: str = "fp32", **fields: Any) -> "Reference":
        """The same weights in transformers' own arithmetic, or our page of torch for deepseek."""
        folder = self.checkpoint(family, dtype=dtype, **fields)
        if folder not in self._references:
            self._references[folder] = Reference(folder, family, dtype=DTYPES[dtype])
        return self._references[folder]


class InstantTransfer(ManualTransfer):
    """Reads ahead in no time and says nothing of its speed, so nothing is held back."""

    def __init__(self, source: Any, arena: Any, *, verify: bool) -> None:
        super().__init__(source, arena)

    def submit(self, key: Any, slot: int, kind: Kind) -> Any:
        copy = super().submit(key, slot, kind)
        if kind is Kind.PREFETCH:
            self.complete(copy)
        return copy


class Reference:
    """Greedy tokens and logits that owe nothing to outrider's engine."""

    def __init__(self, folder: Path, family: str, *, dtype: torch.dtype) -> None:
        self._folder = folder
        self._model: Any = None
        if family != "deepseek":
            from transformers import AutoModelForCausalLM

            self._model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager"
            ).eval()

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] in fp32, of one pass over all tokens."""
        ids = torch.tensor(token_ids)
        if self._model is None:
            return deepseek_reference.logits(self._folder, ids).float()
        return self._model(ids[None]).logits[0].float()

    @torch.no_grad()
    def generate(self, prompt: list[int], *, max_tokens: int) -> list[int]:
        """Greedy, by transformers itself where it knows the family; ends after the end token, 0."""
        if self._model is None:
            token_ids = list(prompt)
            while len(token_ids) < len(prompt) + max_tokens:
                token_ids.append(int(self.logits(token_ids)[-1].argmax()))
                if token_ids[-1] == 0:
                    break
            return token_ids[len(prompt) :]
        ids = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return ids[0, len(prompt) :].tolist()


def record(engine: Engine) -> list[torch.Tensor]:
    """The list to which each pass's logits [sequences, V] are added from now on."""
    logits: list[torch.Tensor] = []
    run = engine._runner.run

    def recorded(batch: Any) -> Any:
        output = run(batch)
        logits.append(output.logits.clone())
        return output

    engine._runner.run = recorded  # type: ignore[method-assign]
    return logits


def generate(engine: Engine, prompts: list[list[int]], *, max_tokens: int) -> Generated:
    """Greedy tokens of prompts run at once, with all logits."""
    from outrider.runtime.request import SamplingParams

    logits = record(engine)
    results = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    experts = results[0].stats.experts
    return Generated(
        [list(result.token_ids) for result in results], logits, experts.prefill + experts.decode
    )


def prompt_of(length: int, *, seed: int = 0) -> list[int]:
    """Random token ids other than the end token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 320, (length,), generator=generator).tolist()


class WrongPredictor:
    """Is sure of the experts that will not be used: the complement of what was used last."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.shape = loaded.shape
        self._steps = StepCount()
        self._used = np.zeros((self.shape.num_moe_layers, self.shape.num_experts), dtype=bool)

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast:
        self._steps.before_token()
        probability = np.where(self._used, 0.0, 0.95).astype(np.float32)
        return Forecast(self._steps.step, 0, self.shape.num_moe_layers, probability)

    def in_pass(self, layer_idx: int, router_input: torch.Tensor) -> None:
        self._steps.in_pass()

    def observe(self, layer_idx: int, topk_ids: Any, topk_weights: Any, router_input: Any) -> None:
        self._steps.in_pass()
        self._used[layer_idx] = False
        self._used[layer_idx, topk_ids.reshape(-1)] = True
