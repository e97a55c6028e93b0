"""The rows of benchmark documents as structs, a kind each: `documents` puts them together."""

from typing import Literal

import msgspec

Number = float | None
Interval = tuple[float, float] | None


class Surroundings(msgspec.Struct, kw_only=True):
    """What a run was taken with; see `environment`."""

    commit: str | None
    has_uncommitted_changes: bool | None
    date: str
    versions: dict[str, str]
    platform: str
    cpu: str
    num_cpus: int
    memory_bytes: int
    load_average: tuple[float, ...]


class Spread(msgspec.Struct, kw_only=True):
    """A median's interval, and how many values it is of."""

    low: float
    high: float
    confidence: float
    count: int


class Stamped(msgspec.Struct, kw_only=True):
    """What every row carries by itself."""

    commit: str | None
    date: str
    versions: dict[str, str]
    cpu: str
    num_cpus: int


class ReplayRow(Stamped, kw_only=True):
    """One policy, predictor and budget, warm or cold."""

    policy: str
    predictor: str
    prefetch: Literal["on", "off", "auto"]
    budget: str
    hit_rate: Number
    late_rate: Number
    miss_rate: Number
    bytes_per_token: Number
    on_demand_bytes_per_token: Number
    prefetched_bytes_per_token: Number
    wasted_bytes_per_token: Number
    stall_s_per_token: Number
    tokens_per_second: Number
    precision: Number
    ci: dict[str, Interval]
    cache: Literal["warm", "cold"]
    simulated: Literal[True]
    slots: int
    experts: int
    budget_bytes: int
    expert_bytes: int
    link_bytes_per_s: float
    format: str
    device: str
    model_shape: str
    tokens: int
    documents: int
    is_stable: bool
    seed: int
    repetitions: int
    model: str
    fingerprint: str
    recall_at_k: Number = None
    recall_on_misses: Number = None


class SimulatedRow(ReplayRow, kw_only=True):
    """The same with the bound of its budget."""

    roofline_tokens_per_second: float
    roofline_share: float
    lru_missed_bytes_per_token: float


class FitRow(msgspec.Struct, kw_only=True):
    """One device and format."""

    simulated: Literal[True]
    device: str
    model_shape: str
    format: str
    context_tokens: int
    runs: bool
    dense_bytes: float
    kv_bytes: float
    room_bytes: float
    expert_bytes: float
    experts_bytes: float
    experts: int
    resident_experts: int
    resident_share: float
    routed_bytes_per_token: float
    device_s_per_token: float
    resident_roofline_tokens_per_second: float
    roofline_tokens_per_second: Number
    serial_tokens_per_second: Number
    on_demand_tokens_per_second: Number
    batch_traces: int
    trace_tokens: int
    traces_per_hour: Number
    roofline_traces_per_hour: Number


class DecodeRow(Stamped, kw_only=True):
    """One arm, budget and state of the caches, measured."""

    arm: str
    format: str
    budget: str
    tokens_per_second: float
    spread: Spread
    ttft_s: float
    bytes_per_token: float
    hit_rate: Number
    late_rate: Number
    stall_s_per_token: float
    roofline_tokens_per_second: float
    roofline_share: float
    rss_peak_bytes: int
    cache: Literal["warm", "cold"]
    repetitions: int
    token_agreement: float
    outside_products_share: Number = None
    memory_limit_bytes: int | None
    memory_fence: str
    link_limit_bytes_per_s: int | None
    storage_bytes_per_token: float
    model: str
    fingerprint: str
    device: str
    device_name: str = ""
    seed: int


class TransferRow(Stamped, kw_only=True):
    """One medium, block size and number of reads at a time, measured."""

    medium: Literal["disk", "memory", "link"]
    block_bytes: int
    depth: int
    gb_per_s: float
    spread: Spread
    microseconds_per_block: float
    is_direct: bool | None
    repetitions: int
    device: str


class KernelRow(Stamped, kw_only=True):
    """One operation, implementation, format and shape, measured; no speed for a wrong result."""

    op: str
    impl: str
    format: str
    shape: str
    phase: Literal["decode", "prefill"]
    gb_per_s: Number
    share_of_read: Number
    error: float


class ServeRow(Stamped, kw_only=True):
    """One number of clients; names and definitions of `vllm bench serve`."""

    max_concurrency: int
    num_prompts: int
    completed: int
    failed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p99_itl_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    p99_e2el_ms: float
    spread: Spread
    same_tokens_as_alone: Number
    experts: dict[str, Number]
    repetitions: int


class ValidationRow(msgspec.Struct, kw_only=True):
    """One configuration, run and simulated."""

    name: str
    model: str
    format: str
    budget: str
    eviction: str
    predictor: str
    prefetch: str
    throttle_bytes_per_s: Number
    is_calibration: bool
    measured_tokens_per_second: float
    spread: Spread
    simulated_tokens_per_second: float
    error: float


class PredictionRow(Stamped, kw_only=True):
    """One forecast judged, as `outrider evaluate` has it."""

    predictor: str
    moment: str
    distance: int
    top1: Number
    top2: Number
    recall_at_k: Number
    recall_at_2k: Number
    exact: Number
    precision: Number
    recall_on_misses: dict[str, Number]
    ece: Number
    brier_skill: Number
    microseconds: Number
    parameters: int


class TimelineEvent(msgspec.Struct, kw_only=True):
    """What one lane did for so long."""

    lane: Literal["processor", "link"]
    name: str
    start_s: float
    seconds: float


class Timeline(msgspec.Struct, kw_only=True):
    """One token in time: of a replay, or of a run that was watched."""

    arm: str
    simulated: bool
    seconds: float
    events: list[TimelineEvent]
