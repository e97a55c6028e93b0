"""Workers around the toy model of tests/collect, for pools on a real Ray cluster."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from outrider.collect.passes import FinishedShard
from outrider.collect.plan import ShardTask
from outrider.runtime.scaleout.collection import ShardWorker


def load_toy() -> ModuleType:
    """tests/collect/toy.py under the name that its own tests load it by."""
    name = "collect_test_toy"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "collect" / "toy.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class ToyShardWorker(ShardWorker):
    """A ShardWorker of the toy model that waits after each batch and leaves its process id.

    It begins once `together` workers have started. `max_batch` samples of `max_tokens` are what
    fits into its memory.
    """

    def __init__(
        self,
        pids: Path,
        pause_s: float,
        together: int = 1,
        max_batch: int = 10**9,
        max_tokens: int = 10**9,
    ) -> None:
        import torch

        torch.set_num_threads(1)
        toy = load_toy()

        class Bounded(toy.ToyMoe):
            def forward(self, input_ids, attention_mask=None, use_cache=False):
                if input_ids.shape[1] > max_tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
                return super().forward(input_ids, attention_mask, use_cache)

        self._hold(Bounded(max_batch=max_batch), toy.SHAPE, "toy", "fp32")
        self._pause_s = pause_s
        self._pids, self._together = pids, together
        (pids / str(os.getpid())).touch()

    def run(self, manifest: bytes, task: ShardTask) -> FinishedShard:
        deadline = time.monotonic() + 120
        while len(list(self._pids.iterdir())) < self._together and time.monotonic() < deadline:
            time.sleep(0.02)
        return super().run(manifest, task)

    def _tell(self, done: int) -> None:
        super()._tell(done)
        time.sleep(self._pause_s)
