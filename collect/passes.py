"""The samples of one shard through a ready model: batches, the answer to a full memory, the bytes.

A pure function of its task: the same samples give the same shard, in whichever process. Writes
nothing, knows no other shard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from .capture import RouterCapture, RoutingRows
from .devices import DeviceMemory, device_memory
from .diversity import Diversity
from .errors import OutOfMemoryError
from .plan import ShardTask
from .routers import RouterSet, decoder, model_device
from .sampling import Samples
from .trace.columns import SPLITS
from .trace.encoding import EncodedShard, ShardRows, encode_shard
from .trace.manifest import Manifest

log = logging.getLogger("outrider.collect")


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """One shard's files, the use of experts in it, the seconds of its passes, and the memory of
    the device afterwards.
    """

    encoded: EncodedShard
    counts: Diversity
    forward_s: float
    memory: DeviceMemory


class ShardRunner:
    """Runs shards through one model; a context manager, within which the model is hooked.

    Batch size, threads and columns are those of the manifest; where memory is short the batch size
    is halved and stays so. Not thread-safe.
    """

    def __init__(self, model: Any, routers: RouterSet, manifest: Manifest) -> None:
        self._decoder = decoder(model)
        self._device = model_device(model)
        self._manifest = manifest
        self._capture = RouterCapture(
            routers,
            probabilities=manifest.probabilities,
            hidden_layers=manifest.hidden_layers,
        )
        self._batch_size = min(
            [manifest.batch_size, *(shard.batch_size for shard in manifest.shards)]
        )
        self._forward_s = 0.0

    def __enter__(self) -> Self:
        self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.__exit__(kind, error, trace)

    def run(self, task: ShardTask, told: Callable[[int], None]) -> FinishedShard:
        """One shard; `told` hears after each batch how many of its samples are through. Blocks.

        Where memory is short, all of it is run again at half the batch size. OutOfMemoryError
        where not even one sample fits.
        """
        self._forward_s = 0.0
        with _threads(self._manifest.threads):
            rows = self._fitting(task.samples, told)
        columns = _columns(task)
        columns["topk_ids"] = np.concatenate([part.topk_ids for part in rows])
        columns["topk_weights"] = np.concatenate([part.topk_weights for part in rows])
        if self._manifest.probabilities != "none":
            columns["router_log_probs"] = np.concatenate(
                [part.log_probs for part in rows if part.log_probs is not None]
            )
        hidden = {
            layer_idx: torch.cat([part.hidden[layer_idx] for part in rows])
            for layer_idx in self._manifest.hidden_layers
        }
        counts = Diversity(self._manifest.shape)
        counts.add(columns["topk_ids"])
        encoded = encode_shard(
            ShardRows(
                dataset=task.samples.name,
                first_sample=task.first_sample,
                num_samples=len(task.samples),
                batch_size=self._batch_size,
                columns=columns,
                hidden=hidden,
            ),
            self._manifest,
        )
        return FinishedShard(encoded, counts, self._forward_s, device_memory(self._device))

    def _fitting(self, samples: Samples, told: Callable[[int], None]) -> list[RoutingRows]:
        while True:
            try:
                return self._rows(samples, told)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # Referenced by the traceback, the failed pass would keep its memory.
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._capture.clear()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if self._batch_size == 1:
                raise OutOfMemoryError(
                    f"not even one sample of {self._manifest.context_tokens} tokens fits into "
                    f"memory ({message}); take a smaller --context-tokens, --load-in-4bit or "
                    "--max-memory"
                )
            self._batch_size = max(1, self._batch_size // 2)
            log.warning("out of memory; the shard is run again at batch size %d", self._batch_size)

    def _rows(self, samples: Samples, told: Callable[[int], None]) -> list[RoutingRows]:
        rows = []
        for first in range(0, len(samples), self._batch_size):
            last = min(first + self._batch_size, len(samples))
            rows.append(self._pass(samples.part(first, last)))
            told(last)
        return rows

    def _pass(self, samples: Samples) -> RoutingRows:
        token_ids = torch.from_numpy(samples.token_ids.astype(np.int64))
        lengths = torch.from_numpy(samples.lengths.copy())
        keep = torch.arange(token_ids.shape[1])[None, :] < lengths[:, None]
        began = time.monotonic()
        with torch.inference_mode():
            # Padding stands on the right, where causal attention never lets a real token see it.
            mask = None if bool(keep.all()) else keep.long().to(self._device)
            self._decoder(
                input_ids=token_ids.to(self._device), attention_mask=mask, use_cache=False
            )
        self._forward_s += time.monotonic() - began
        return self._capture.take(keep)


def _columns(task: ShardTask) -> dict[str, np.ndarray]:
    samples, lengths = task.samples, task.samples.lengths
    keep = np.arange(samples.token_ids.shape[1])[None, :] < lengths[:, None]
    position = np.broadcast_to(np.arange(keep.shape[1], dtype=np.uint16), keep.shape)[keep]
    end = task.first_sample + len(samples)
    rows = int(lengths.sum())
    return {
        "document_id": np.repeat(samples.document_id, lengths),
        "split": np.array(SPLITS, dtype=object)[np.repeat(samples.split, lengths)],
        "sample_id": np.repeat(np.arange(task.first_sample, end, dtype=np.uint32), lengths),
        "dataset_name": np.full(rows, samples.name, dtype=object),
        "position": position,
        "document_offset": np.repeat(samples.offset, lengths),
        "token_id": samples.token_ids[keep].astype(np.uint32),
    }


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Products on the CPU change bits with the number of threads, so a resume takes the first
    run's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
