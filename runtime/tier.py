"""Puts the expert tier of an engine together: source, slots, cache, transfers, prefetcher.

The one place that knows which implementation serves which configuration.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch

from ..collect.schema import ExpertKey
from ..kernels.expert_mlp import supports
from ..kernels.weights import ExpertWeights
from ..predictors.base import Predictor
from . import memory
from .config import EngineConfig
from .errors import UsageError
from .executor import ExpertExecutor
from .experts.arithmetic import ExpertArithmetic, KernelArithmetic, ModuleArithmetic
from .experts.cache import ExpertCache
from .experts.eviction import DEFAULT_EVICTION, make_eviction
from .experts.identity import SourceIdentity
from .experts.layout import ExpertSource
from .experts.prefetcher import Mode, Prefetcher
from .experts.slots import SlotArena
from .experts.store import ExpertStore
from .experts.store_cache import store_for
from .experts.thread_transfer import ThreadTransfer
from .experts.tiered import MIN_HOST_SLOTS, Link, TieredTransfer
from .experts.transfer import TransferEngine
from .host_misses import HostMisses
from .models import adapter
from .models.loading import LoadedModel
from .sizes import format_bytes, resolve
from .speculation import choose_predictor
from .tuned_blocks import use_tuned_blocks

logger = logging.getLogger(__name__)

# Activations, logits and allocator slack on top of dense weights and KV cache.
RESERVE_BYTES = 512 << 20
# Context that `auto` leaves room for in the KV cache.
RESERVED_TOKENS = 4096
PackProgress = Callable[[int, int], None]


@dataclass(slots=True)
class ExpertTier:
    """The experts of one engine and everything that moves and holds them."""

    source: ExpertSource
    arena: SlotArena
    transfers: TransferEngine
    executor: ExpertExecutor
    make_predictor: Callable[[], Predictor | None]
    num_slots: int
    predictor_name: str
    eviction_name: str
    host_arena: SlotArena | None = None
    frequencies: np.ndarray | None = None

    def warm(self) -> None:
        """Begin to fill the slots with the experts used most, until the first pass; never blocks.

        Known from the predictor's training, [num_moe_layers, num_experts]; else nothing is done.
        """
        if self.frequencies is None:
            return
        num_experts = self.frequencies.shape[1]
        # A key is a layer and an expert; the stable order leaves ties as they stand.
        ranked = np.argsort(-self.frequencies, axis=None, kind="stable")[: self.num_slots]
        self.executor.prefetcher.warm(
            ExpertKey(*divmod(index, num_experts)) for index in ranked.tolist()
        )

    def close(self) -> None:
        """Stop the copy threads and give the memory back. Blocks until reads under way end."""
        self.executor.close()
        self.transfers.close()
        self.arena.close()
        if self.host_arena is not None:
            self.host_arena.close()
        if self.arena.device.type == "cuda":
            # What torch keeps of it for itself would count as taken.
            torch.cuda.empty_cache()


def expert_source(
    loaded: LoadedModel,
    fmt: str,
    *,
    store: Path | None = None,
    progress: PackProgress | None = None,
    on_wait: Callable[[Path], None] | None = None,
) -> ExpertSource:
    """The experts in `fmt` ("auto": as the checkpoint): in place where possible, else packed.

    With `store` they come from there and from nowhere else, "auto" being its format.
    Packing happens once and blocks for as long as reading all experts takes; see `store_for`.
    """
    obstacle = loaded.in_place_obstacle()
    if store is None and obstacle is None:
        in_place = loaded.experts_in_place()
        if fmt in ("auto", in_place.format):
            return in_place
    if store is not None and fmt == "auto":
        fmt = ExpertStore(store).format
    elif fmt == "auto":
        fmt = plain_format(loaded.dtype)
        logger.info("experts are packed as %s: %s", fmt, obstacle)
    return store_for(
        SourceIdentity.of(loaded.folder, loaded.checkpoint.files),
        fmt,
        shape=loaded.shape,
        layers=loaded.layer_tensors,
        fingerprint=loaded.weights_fingerprint,
        is_transposed=loaded.layers[0].experts.is_transposed,
        at=store,
        progress=progress,
        on_wait=on_wait,
    )


def build_tier(loaded: LoadedModel, config: EngineConfig, *, source: ExpertSource) -> ExpertTier:
    """Slots within the budget, and what fills them.

    Raises InsufficientMemoryError or UsageError for a budget that cannot be kept.
    """
    num_slots = _num_slots(loaded, config, source)
    if config.verify_on_load and source.checksum(ExpertKey(0, 0)) is None:
        raise UsageError(
            "verify_on_load: the checkpoint's own files carry no checksums; pack the experts "
            f"(outrider pack ... --format {source.format} --out DIR) and run from there"
        )
    # Forecasts steer eviction as well, which costs no bandwidth.
    is_foreseeing = config.prefetch != "off" or config.eviction == "forecast"
    wanted = config.predictor if is_foreseeing else "none"
    speculation = choose_predictor(wanted, loaded)
    prefetch = cast("Mode", config.prefetch if speculation.name != "none" else "off")
    eviction = config.eviction
    if eviction == "auto":
        # Where forecasts are made anyway, or would be, they cost nothing more.
        has_victims = num_slots < source.shape.num_routed_experts
        eviction = "forecast" if prefetch != "off" and has_victims else DEFAULT_EVICTION
    cache = ExpertCache(
        num_slots, eviction=make_eviction(eviction, shape=source.shape, num_slots=num_slots)
    )
    arena = SlotArena(num_slots, source.views, source.nbytes, device=loaded.device)
    if loaded.device.type == "cuda":
        use_tuned_blocks()
    arithmetic = _arithmetic(loaded, source, arena)
    # Threads are started last, when nothing is left that could be refused.
    transfers: TransferEngine
    host_arena, host_misses = None, None
    if loaded.device.type == "cpu":
        transfers = ThreadTransfer(source, arena, verify=config.verify_on_load)
    else:
        num_host_slots = _num_host_slots(config, source)
        host_arena = SlotArena(num_host_slots, source.views, source.nbytes, is_pinned=True)
        transfers, host_misses = over_host(loaded, config, source, (host_arena, arena))
    executor = ExpertExecutor(
        shape=source.shape,
        cache=cache,
        transfers=transfers,
        prefetcher=Prefetcher(
            cache, transfers, shape=source.shape, nbytes=source.nbytes, mode=prefetch
        ),
        arithmetic=arithmetic,
        block_bytes=source.nbytes,
        host_misses=host_misses,
    )
    return ExpertTier(
        source,
        arena,
        transfers,
        executor,
        speculation.make,
        num_slots,
        speculation.name,
        eviction,
        host_arena,
        speculation.frequencies,
    )


def over_host(
    loaded: LoadedModel,
    config: EngineConfig,
    source: ExpertSource,
    arenas: tuple[SlotArena, SlotArena],
    *,
    make_link: Callable[[SlotArena, SlotArena], Link] | None = None,
) -> tuple[TieredTransfer, HostMisses | None]:
    """Disk -> host cache -> device, over `arenas` of host and device; and who computes misses.

    `make_link` joins the two arenas; left out, it is CUDA's.
    """
    host_arena, arena = arenas
    if make_link is None:
        # Imported when asked for: only where there is a device are there streams.
        from .experts.cuda_link import CudaLink

        make_link = CudaLink
    # What reaches the host are the device's misses, in which there is little recency left: counts
    # serve a second level better (Zhou et al., "The Multi-Queue Replacement Algorithm", 2001).
    eviction = make_eviction("lfu", shape=source.shape, num_slots=host_arena.num_slots)
    host = ExpertCache(host_arena.num_slots, eviction=eviction)
    link = make_link(host_arena, arena)
    disk = ThreadTransfer(source, host_arena, verify=config.verify_on_load)
    transfers = TieredTransfer(disk, link, host=host, source=source)
    if config.on_miss == "fetch":
        return transfers, None
    mode: Literal["host", "auto"] = "host" if config.on_miss == "host" else "auto"
    return transfers, HostMisses(
        mode,
        host=host,
        arithmetic=_arithmetic(loaded, source, host_arena),
        transfers=transfers,
        nbytes=source.nbytes,
    )


def _num_host_slots(config: EngineConfig, source: ExpertSource) -> int:
    free = memory.available_bytes()
    num_slots = resolve(
        config.host_budget,
        slot_bytes=source.nbytes,
        num_experts_total=source.shape.num_routed_experts,
        available_bytes=free,
        # Page-locked memory is lost to everything else on the machine.
        auto_bytes=free // 2,
        total_bytes=memory.total_bytes(),
    )
    if num_slots < MIN_HOST_SLOTS:
        raise UsageError(
            f"host memory {config.host_memory} holds {num_slots} experts: at least "
            f"{MIN_HOST_SLOTS} ({format_bytes(MIN_HOST_SLOTS * source.nbytes)}) are needed"
        )
    return num_slots


def _num_slots(loaded: LoadedModel, config: EngineConfig, source: ExpertSource) -> int:
    free, total = memory.device_bytes(loaded.device.type, loaded.device.index)
    tokens = min(RESERVED_TOKENS, adapter.context_length(loaded.config) or RESERVED_TOKENS)
    kept = adapter.kv_bytes_per_token(loaded.config, loaded.dtype) * tokens + RESERVE_BYTES
    available = max(0, free - kept)
    is_cpu = loaded.device.type == "cpu"
    num_slots = resolve(
        config.expert_budget,
        slot_bytes=source.nbytes,
        num_experts_total=source.shape.num_routed_experts,
        available_bytes=available,
        auto_bytes=min(available, free // 2) if is_cpu else available,
        total_bytes=total,
    )
    logger.info(
        "expert memory %s: %d of %d experts in %s",
        config.expert_memory,
        num_slots,
        source.shape.num_routed_experts,
        format_bytes(num_slots * source.nbytes),
    )
    return num_slots


def module_arithmetic(
    loaded: LoadedModel, source: ExpertSource, arena: SlotArena
) -> ModuleArithmetic:
    """Experts as PyTorch computes them, one after the other: for families that kernels do not
    serve, and to hold the kernels against."""
    return ModuleArithmetic(arena, fmt=source.format, is_transposed=_is_transposed(loaded, source))


def _is_transposed(loaded: LoadedModel, source: ExpertSource) -> bool:
    # A packed store holds every projection as [out, in]; a checkpoint as its family has it.
    is_packed = getattr(source, "index", None) is not None
    return loaded.layers[0].experts.is_transposed and not is_packed


def _arithmetic(loaded: LoadedModel, source: ExpertSource, arena: SlotArena) -> ExpertArithmetic:
    experts = loaded.layers[0].experts
    is_transposed = _is_transposed(loaded, source)
    activation = adapter.activation(loaded.layers[0])
    impl = "cpu" if arena.device.type == "cpu" else "triton"
    if activation is not None and supports(
        source.format,
        loaded.dtype,
        activation=activation,
        impl=impl,
        is_transposed=is_transposed,
        is_concatenated=experts.is_concatenated,
        has_gate=experts.has_gate,
    ):
        weights = ExpertWeights(
            {name: arena.stacked(name) for name in source.views},
            source.shape.hidden_size,
            fmt=source.format,
            activation=activation,
            is_transposed=is_transposed,
            is_concatenated=experts.is_concatenated,
        )
        return KernelArithmetic(weights, impl=impl)
    return module_arithmetic(loaded, source, arena)


def plain_format(dtype: torch.dtype) -> str:
    """Name of the format that keeps weights of `dtype` as they are."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
