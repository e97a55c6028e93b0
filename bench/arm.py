"""One way of running the model, ready to be timed: the protocol, and the engine as an arm.

An arm loads once, then decodes the same passages as often as it is told. Knows nothing of the other
arms or of statistics. Another system joins by a class with these methods and a line in
`worker.ARMS`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from ..collect.schema import ExpertKey, ModelShape
from ..kernels import native
from ..predictors.oracle import Oracle
from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.experts.cache import Kind
from ..runtime.machine import cpu_name
from ..runtime.models.loading import resolve_folder
from ..runtime.request import GenerationRequest
from ..runtime.sampler import SampledToken, Sampler, SamplerState
from ..runtime.stats import ExpertTraffic
from ..runtime.tier import build_tier, module_arithmetic
from .bandwidth import drop_page_cache
from .records import Measurement, Passage, Recording, Subject
from .roofline import Pass
from .throttle import throttle
from .witness import Witness, watched


class Arm(Protocol):
    """Blocks in every call. Errors are OutriderErrors."""

    def load(self) -> Subject: ...

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def record(self, passages: list[Passage]) -> Recording: ...

    def prepare(self, is_cold: bool) -> float:
        """Get ready for a timed run: cold means slots empty and the model's files not cached.

        Returns the share of probed pages that the system kept in its cache all the same.
        """
        ...

    def run(self, passages: list[Passage]) -> Measurement: ...

    def close(self) -> None: ...


class EngineArm:
    """outrider's engine. `is_filled`: every expert is read before anything is timed, and stays.

    `is_foretold`: its predictor is the oracle, told what `record` wrote down of each passage.
    `is_eager`: experts are PyTorch's products, one expert after the other, not the kernels'.
    `link_bytes_per_s`: experts are read no faster, as from a slower disk.
    """

    def __init__(
        self,
        *,
        model: str | None,
        options: dict[str, Any],
        store: str | None = None,
        is_filled: bool = False,
        is_foretold: bool = False,
        is_eager: bool = False,
        link_bytes_per_s: float | None = None,
    ) -> None:
        self._model = model
        self._config = EngineConfig(**options)
        self._store = None if store is None else Path(store)
        self._is_filled = is_filled
        self._is_foretold = is_foretold
        self._is_eager = is_eager
        self._link_bytes_per_s = link_bytes_per_s
        self._foretold: dict[str, list[Pass]] = {}
        self._opened: Engine | None = None

    @property
    def _engine(self) -> Engine:
        assert self._opened is not None, "load comes first"
        return self._opened

    def load(self) -> Subject:
        """Load the model, and the experts where the arm holds them all."""
        self._opened = Engine.from_config(self._config, model=self._model, store=self._store)
        self._throttle()
        if self._is_filled:
            _fill(self._engine)
        if self._is_eager:
            assert self._is_filled, "a tier that is built anew would compute by the kernels again"
            tier = self._engine.tier
            tier.executor.arithmetic = module_arithmetic(
                self._engine.loaded, tier.source, tier.arena
            )
        engine, loaded, source = self._engine, self._engine.loaded, self._engine.tier.source
        shape = source.shape
        expert_bytes = source.layout(ExpertKey(0, 0)).bytes_read
        routed = shape.num_moe_layers * shape.top_k * expert_bytes
        return Subject(
            model=str(resolve_folder(self._model, revision=self._config.revision)),
            fingerprint=shape.fingerprint,
            format=source.format,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            device_name=_name_of(loaded.device),
            predictor=engine.tier.predictor_name,
            prefetch=self._config.prefetch,
            eviction=engine.tier.eviction_name,
            num_moe_layers=shape.num_moe_layers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            num_slots=engine.tier.num_slots,
            budget_bytes=engine.tier.num_slots * source.nbytes,
            expert_bytes=expert_bytes,
            active_bytes=_dense_bytes_per_token(engine) + routed,
            dense_bytes=loaded.dense_bytes,
            num_threads=torch.get_num_threads(),
            load_s=engine.load_s,
            files=[str(file) for file in self._files()],
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the engine makes them of a prompt."""
        return [list(self._engine.tokenizer(text)["input_ids"]) for text in texts]

    def record(self, passages: list[Passage]) -> Recording:
        """Run untimed, writing down what the routers chose; an oracle then runs once more, told.

        Nobody predicts in an oracle's first run: what a controller would learn of one that knows
        nothing would keep it from being tried when it knows all.
        """
        executor, recorder = self._engine.tier.executor, _RoutingRecorder()
        digest = xxhash.xxh3_64()
        executor.on_routing = recorder.take
        try:
            chosen = []
            for passage in passages:
                recorder.is_decode = False
                first = len(recorder.passes)
                chosen.append(self._decode(passage, recorder=recorder, digest=digest).token_ids)
                passes = recorder.passes[first:]
                self._foretold[passage.name] = [one for one in passes if one.is_decode]
        finally:
            executor.on_routing = None
        if self._is_foretold:
            for passage in passages:
                self._decode(passage)
        return Recording(chosen, digest.hexdigest(), recorder.passes)

    def prepare(self, is_cold: bool) -> float:
        """See `Arm.prepare`. An arm that holds all experts keeps them."""
        if not is_cold:
            return 0.0
        engine = self._engine
        if not self._is_filled:
            loaded, tokenizer, source = engine.loaded, engine.tokenizer, engine.tier.source
            # Its slots go with it, before those of the next are made.
            engine.close()
            self._opened = engine = None
            tier = build_tier(loaded, self._config, source=source)
            self._opened = Engine(loaded, tier, config=self._config, tokenizer=tokenizer)
            self._throttle()
        return drop_page_cache(self._files())

    def run(self, passages: list[Passage]) -> Measurement:
        """Decode every passage once, one after the other, and time it."""
        before = read_bytes()
        runs = [self._decode(passage) for passage in passages]
        return Measurement(
            token_ids=[one.token_ids for one in runs],
            decode_tokens=sum(len(one.token_ids) - 1 for one in runs),
            decode_s=sum(one.decode_s for one in runs),
            ttft_s=median(one.ttft_s for one in runs),
            stall_s=sum(one.stall_s for one in runs),
            traffic=ExpertTraffic.merge(one.traffic for one in runs).as_dict(),
            rss_peak_bytes=rss_peak_bytes(),
            read_bytes=read_bytes() - before,
            product_s=sum(one.product_s for one in runs) if self._times_products else None,
        )

    @property
    def _times_products(self) -> bool:
        """Whether all products of a pass are the native library's, which times them."""
        engine = self._engine
        return engine.is_native and engine.tier.executor.arithmetic.native_weights is not None

    def timeline(self, passages: list[Passage], arm: str) -> dict[str, Any]:
        """Decode once more, untimed, and tell one token in time; see `Witness.timeline`."""
        with watched(self._engine.tier.transfers) as witness:
            for passage in passages:
                self._decode(passage, witness=witness)
        return witness.timeline(arm)

    def _throttle(self) -> None:
        if self._link_bytes_per_s is not None:
            throttle(self._engine.tier.transfers, self._link_bytes_per_s)

    def close(self) -> None:
        """Free what the arm holds; idempotent."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _decode(
        self,
        passage: Passage,
        *,
        recorder: "_RoutingRecorder | None" = None,
        digest: Any = None,
        witness: Witness | None = None,
    ) -> "_Decoded":
        engine = self._engine
        if self._is_foretold:
            shape, passes = engine.tier.source.shape, self._foretold.get(passage.name)
            engine.tier.make_predictor = lambda: _told(shape, passage, passes) if passes else None
        sequence = engine.submit(
            GenerationRequest(
                prompt_token_ids=passage.prompt_ids,
                max_tokens=passage.num_tokens,
                temperature=0.0,
                ignore_eos=True,
            )
        )
        if isinstance(sequence.predictor, Oracle):
            # A controller that rests does not ask it, and the sequence goes on meanwhile.
            sequence.predictor.follow(lambda: sequence.step)
        sampler = FollowingSampler(sequence.sampler, passage.text_ids, digest=digest)
        sequence.sampler = sampler  # type: ignore[assignment]
        while not sequence.token_ids and not sequence.is_finished:
            engine.step()
        if recorder is not None:
            recorder.is_decode = True
        stall_s = sequence.stats.timings.stall_s
        product_s, began = native.product_s(), time.perf_counter()
        while not sequence.is_finished:
            if witness is None:
                engine.step()
            else:
                with witness.token():
                    engine.step()
        decode_s = time.perf_counter() - began
        if sequence.error is not None:
            raise sequence.error
        return _Decoded(
            token_ids=sampler.chosen,
            decode_s=decode_s,
            ttft_s=sequence.stats.timings.ttft_s,
            stall_s=sequence.stats.timings.stall_s - stall_s,
            product_s=native.product_s() - product_s,
            traffic=sequence.stats.experts.decode,
        )

    def _files(self) -> list[Path]:
        source = self._engine.tier.source
        files = set(self._engine.loaded.checkpoint.files)
        for layer_idx in range(source.shape.num_moe_layers):
            for expert_idx in range(source.shape.num_experts):
                layout = source.layout(ExpertKey(layer_idx, expert_idx))
                files |= {extent.file for extent in layout.extents}
        return sorted(files)


@dataclass(frozen=True, slots=True)
class _Decoded:
    token_ids: list[int]
    decode_s: float
    ttft_s: float
    stall_s: float
    product_s: float
    traffic: ExpertTraffic


class FollowingSampler:
    """Remembers the model's own choice, and goes on with the text's token where there is one."""

    def __init__(self, sampler: Sampler, text_ids: Sequence[int], *, digest: Any) -> None:
        self._sampler = sampler
        self._text_ids = text_ids
        self._digest = digest
        self.chosen: list[int] = []

    def sample(self, logits: torch.Tensor, state: SamplerState) -> SampledToken:
        if self._digest is not None:
            self._digest.update(logits.contiguous().cpu().numpy())
        token = self._sampler.sample(logits, state)
        place = len(self.chosen)
        self.chosen.append(token.token_id)
        if not self._text_ids:
            return token
        return replace(token, token_id=self._text_ids[place])


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


class _RoutingRecorder:
    """Writes down the distinct experts of every layer."""

    def __init__(self) -> None:
        self.is_decode = False
        self.passes: list[Pass] = []

    def take(self, layer_idx: int, ids: np.ndarray) -> None:
        if layer_idx == 0:
            self.passes.append(Pass(self.is_decode, []))
        self.passes[-1].layers.append(np.unique(ids).tolist())


def _told(shape: ModelShape, passage: Passage, passes: Sequence[Pass]) -> Oracle:
    """The oracle for one passage; of the prompt, which is no decode step, it says nothing true."""
    routing = np.zeros(
        (len(passage.prompt_ids) + len(passes), shape.num_moe_layers, shape.top_k), np.int64
    )
    for place, one in enumerate(passes, start=len(passage.prompt_ids)):
        routing[place] = one.layers
    oracle = Oracle(shape)
    oracle.foresee(routing)
    return oracle


def _fill(engine: Engine) -> None:
    tier = engine.tier
    cache, shape = tier.executor.cache, tier.source.shape
    for layer_idx in range(shape.num_moe_layers):
        copies = []
        for expert_idx in range(shape.num_experts):
            key = ExpertKey(layer_idx, expert_idx)
            slot = cache.reserve(key, Kind.ON_DEMAND)
            assert slot is not None, "an arm that is filled has a slot for every expert"
            copies.append(tier.transfers.submit(key, slot, Kind.ON_DEMAND))
        for copy in copies:
            copy.wait()
            cache.commit(copy.slot)


def _dense_bytes_per_token(engine: Engine) -> int:
    """Dense weights that a decoded token reads: of the input embeddings, one row."""
    model = engine.loaded.model
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    table = inputs.weight
    # A quantised head has no weight to ask for, and is never the embedding.
    is_plain = isinstance(outputs, torch.nn.Linear)
    if is_plain and outputs.weight.data_ptr() == table.data_ptr():
        return engine.loaded.dense_bytes
    row_bytes = table.shape[1] * table.element_size()
    return engine.loaded.dense_bytes - table.numel() * table.element_size() + row_bytes


def rss_peak_bytes() -> int:
    """Largest resident set of this process so far, file pages included."""
    return _process_figure("status", "VmHWM") * 1024


def read_bytes() -> int:
    """Bytes that this process had read from storage so far, page faults and threads included."""
    return _process_figure("io", "read_bytes")


def _process_figure(file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/self/{file}").read_text().splitlines()
    except OSError:  # some containers keep `io` to themselves
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
