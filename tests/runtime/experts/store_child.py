"""A synthetic checkpoint for the store's tests, and what their child processes do with it.

Run as `python store_child.py COMMAND FOLDER [...]`; prints one JSON document.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from outrider.collect.schema import ModelShape
from outrider.runtime.errors import InvalidDataError, OutriderError
from outrider.runtime.experts.identity import SourceIdentity
from outrider.runtime.experts.index import INDEX_NAME, PARTIAL_INDEX_NAME, Shard, read_index
from outrider.runtime.experts.pack import pack_store
from outrider.runtime.experts.store import ExpertStore

KILL, FAIL = 1, 2  # store_faults.c
SHAPE = ModelShape(
    num_moe_layers=2, num_experts=3, top_k=2, hidden_size=24, expert_size=20, fingerprint=""
)
SOURCE = SourceIdentity(fingerprint="f" * 64, folder="/nowhere", files=())
TWO_BLOCKS = 2 * 4096  # splits SHAPE's layers into shards of two experts and one


class Checkpoint:
    """`layers(l)` for pack_store, made from a seed; notes which layers were asked for."""

    def __init__(
        self,
        shape: ModelShape = SHAPE,
        *,
        dtype: torch.dtype = torch.float32,
        has_bias: bool = False,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.has_bias = has_bias
        self.seed = seed
        self.asked: list[int] = []

    def __call__(self, layer_idx: int) -> dict[str, Tensor]:
        self.asked.append(layer_idx)
        return self.tensors(layer_idx)

    def tensors(self, layer_idx: int) -> dict[str, Tensor]:
        shape = self.shape
        generator = torch.Generator().manual_seed(1000 * self.seed + layer_idx)
        experts, hidden, size = shape.num_experts, shape.hidden_size, shape.expert_size
        sizes = {
            "gate_up_proj": (experts, 2 * size, hidden),
            "down_proj": (experts, hidden, size),
        }
        if self.has_bias:
            sizes |= {"gate_up_proj_bias": (experts, 2 * size), "down_proj_bias": (experts, hidden)}
        return {
            name: torch.randn(dimensions, generator=generator).to(self.dtype)
            for name, dimensions in sizes.items()
        }


def pack(out: Path, checkpoint: Checkpoint | None = None, *, fmt: str = "int8", **options):
    """pack_store with this module's checkpoint; by default in shards of two experts and one."""
    checkpoint = checkpoint or Checkpoint()
    return pack_store(
        out,
        **{
            "shape": checkpoint.shape,
            "fmt": fmt,
            "layers": checkpoint,
            "source": SOURCE,
            "max_shard_bytes": TWO_BLOCKS,
        }
        | options,
    )


def prepare(scenario: str, out: Path) -> None:
    """The folder as it stands before the packing that is disturbed."""
    if scenario == "other-format":
        pack(out, fmt="bf16")
    if scenario == "damaged-shard":
        pack(out)
        os.truncate(out / "experts-00001-000.safetensors", 5000)
    if scenario == "touched-source":
        pack(out, source=SourceIdentity(SOURCE.fingerprint, "/elsewhere", ()))


def describe(out: Path) -> str:
    """What a reader makes of the folder: "sound FORMAT", "damaged FORMAT" or "refused"."""
    try:
        store = ExpertStore(out)
    except InvalidDataError:
        return "refused"
    return f"{'damaged' if store.verify() else 'sound'} {store.format}"


def in_fork(mode: int, nth: int, error: int, action: Callable[[], object]) -> dict[str, object]:
    """Run `action`, armed, in a fork of this warm process; returns how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faults = ctypes.CDLL(None)
        outcome: dict[str, object] = {}
        faults.fault_arm(mode, nth, error)
        try:
            action()
        except OutriderError as caught:
            outcome["error"] = str(caught)
        except BaseException as caught:
            outcome["unexpected"] = repr(caught)
        faults.fault_arm(0, 0, 0)
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        written = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status)} | (json.loads(written) if written else {})


def disturb(
    folder: Path, scenario: str, mode: int, *, error: int = 0, stride: int = 1
) -> list[dict[str, object]]:
    """Disturb a packing at its first, (1 + stride)th, ... step until it runs undisturbed.

    After each: what a reader sees, which files are there, and how packing again ends.
    """
    template, reference = folder / "template", folder / "reference"
    template.mkdir(parents=True)
    prepare(scenario, template)
    expected = pack(reference).index.shards
    overwrite = scenario == "other-format"
    steps: list[dict[str, object]] = []
    while True:
        nth = 1 + stride * len(steps)
        out = folder / f"out-{nth}"
        shutil.copytree(template, out)
        step = in_fork(mode, nth, error, lambda out=out: pack(out, overwrite=overwrite))
        step["reader"] = describe(out)
        step["files"] = sorted(path.name for path in out.iterdir())
        before = shard_identities(out)
        recorded = recorded_shards(out)
        checkpoint = Checkpoint()
        again = pack(out, checkpoint, overwrite=overwrite)
        step["asked"] = checkpoint.asked
        step["unfinished_layers"] = sorted(
            {shard.blocks[0].layer_idx for shard in expected if shard.file not in recorded}
        )
        step["remade"] = [name for name in recorded if shard_identities(out)[name] != before[name]]
        step["final_files"] = sorted(path.name for path in out.iterdir())
        step["is_whole"] = again.verify() == [] and again.index.shards == expected
        shutil.rmtree(out)
        steps.append(step)
        if not step["killed"] and "error" not in step:
            return steps


def shard_identities(out: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.glob("*.safetensors")
    }


def recorded_shards(out: Path) -> list[str]:
    """Shards that the folder's index, finished or partial, says are done for the int8 store."""
    for name in (INDEX_NAME, PARTIAL_INDEX_NAME):
        try:
            index = read_index(out / name)
        except FileNotFoundError:
            continue
        if index.format == "int8":
            return [shard.file for shard in index.shards if is_whole(out / shard.file, shard)]
    return []


def is_whole(path: Path, shard: Shard) -> bool:
    return path.exists() and path.stat().st_size == shard.nbytes


def with_limit(folder: Path, limit: int) -> dict[str, object]:
    """Pack where no file may grow beyond `limit` bytes, then without the limit."""
    out = folder / "out"
    out.mkdir(parents=True)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            pack(out, max_shard_bytes=2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    outcome = in_fork(0, 0, 0, limited)
    outcome["files"] = sorted(path.name for path in out.iterdir())
    outcome["again"] = pack(out, max_shard_bytes=2**30).verify() == []
    return outcome


def peak_bytes() -> int:
    """Peak resident bytes of this process; `ru_maxrss` would be the forking parent's at first."""
    with Path("/proc/self/status").open() as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_memory(folder: Path, is_leaking: bool) -> dict[str, int]:
    """Pack 8 layers of 16 MiB; how far the peak RSS rose above what it was before."""
    shape = ModelShape(8, 8, 2, 512, 341, "")
    kept: list[dict[str, Tensor]] = []

    def layers(layer_idx: int) -> dict[str, Tensor]:
        experts, hidden, size = shape.num_experts, shape.hidden_size, shape.expert_size
        tensors = {
            "gate_up_proj": torch.full((experts, 2 * size, hidden), 1.0 + layer_idx),
            "down_proj": torch.full((experts, hidden, size), -1.0 - layer_idx),
        }
        if is_leaking:
            kept.append(tensors)
        return tensors

    pack(folder / "warm")
    before = peak_bytes()
    pack(folder / "out", Checkpoint(shape), layers=layers, max_shard_bytes=2**30)
    rise = peak_bytes() - before
    layer_bytes = shape.num_experts * 3 * shape.hidden_size * shape.expert_size * 4
    return {"rise": rise, "layer_bytes": layer_bytes}


def hold(out: Path, started: Path, go: Path) -> dict[str, object]:
    """Pack, but not before `go` is there; `started` says that the folder is held."""
    checkpoint = Checkpoint()

    def layers(layer_idx: int) -> dict[str, Tensor]:
        started.touch()
        while not go.exists():
            time.sleep(0.01)
        return checkpoint(layer_idx)

    pack(out, layers=layers)
    return {"asked": checkpoint.asked}


def all_faults(folder: Path) -> dict[str, object]:
    """Every disturbance, one after the other, in this one warm process."""
    torch.set_num_threads(1)  # no thread pool: forks stay safe
    results: dict[str, object] = {
        scenario: disturb(folder / scenario, scenario, KILL)
        for scenario in ("fresh", "other-format", "damaged-shard", "touched-source")
    }
    for name, stride in {"ENOSPC": 1, "EDQUOT": 7, "EIO": 7, "EROFS": 1000}.items():
        error = getattr(errno, name)
        results[name] = disturb(folder / name, "fresh", FAIL, error=error, stride=stride)
    results["limit"] = with_limit(folder / "limit", 10_000)
    return results


def main(command: str, folder: Path, *arguments: str) -> None:
    if command == "faults":
        result: object = all_faults(folder)
    elif command == "memory":
        result = {kind: peak_memory(folder / kind, kind == "leaking") for kind in arguments}
    elif command == "hold":
        result = hold(folder, *map(Path, arguments))
    else:
        raise SystemExit(f"unknown command {command}")
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
