"""The values that arms and the benchmark exchange, as they cross a process border. No torch."""

from dataclasses import dataclass

from .roofline import Pass


@dataclass(frozen=True, slots=True)
class Passage:
    """One prompt and what follows it: `text_ids` are fed in place of the model's own tokens.

    The model still chooses a token at each place, which is what arms are compared by. Where
    `text_ids` is empty, `num_tokens` tokens are generated greedily instead.
    """

    name: str
    prompt_ids: list[int]
    text_ids: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What an arm runs. `active_bytes` are the weights that one decoded token reads.

    `expert_bytes` is what one expert takes from the link; `files` are those it is read from.
    """

    model: str
    fingerprint: str
    format: str
    dtype: str
    device: str
    device_name: str
    predictor: str
    prefetch: str
    eviction: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    num_slots: int
    budget_bytes: int
    expert_bytes: int
    active_bytes: int
    dense_bytes: int
    num_threads: int
    load_s: float
    files: list[str]


@dataclass(frozen=True, slots=True)
class External:
    """What another system's arm runs: its version, and the files it reads its weights from."""

    version: str
    load_s: float
    files: list[str]
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """One untimed run: the tokens chosen, a checksum of all logits, and the routing."""

    token_ids: list[list[int]]
    logits_checksum: str
    passes: list[Pass]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed run over all passages.

    `decode_s` runs from a passage's first token to its last, with sampling and detokenising, as a
    user waits; `stall_s` is the part of it that waited for experts. `ttft_s` is the median.
    `product_s` is the part spent in products of matrices, None where they are not all timed.
    `traffic` counts decode steps only. `read_bytes` is what the process read from storage, by
    whatever call or page fault, prompts included.
    """

    token_ids: list[list[int]]
    decode_tokens: int
    decode_s: float
    ttft_s: float
    stall_s: float
    traffic: dict[str, int]
    rss_peak_bytes: int
    read_bytes: int = 0
    product_s: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens over the time they took."""
        return self.decode_tokens / self.decode_s

    @property
    def outside_share(self) -> float | None:
        """Of the time that did not wait for experts, the part outside of products of matrices."""
        if self.product_s is None:
            return None
        return 1.0 - self.product_s / (self.decode_s - self.stall_s)


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes a second, now: a plain memory read by all threads, and the model's files.

    `reads` says what the link is: "direct" or "buffered" reads of the files (past the page cache by
    O_DIRECT, or not), or "pinned" host memory, copied to a device.
    """

    read_bytes_per_s: float
    link_bytes_per_s: float
    reads: str
