"""The geometry checkpoint: a small DeepSeek-MoE widened to real sizes, its function unchanged.

Knows how each tensor of the family is padded so that what is added only ever meets zeros. Knows
nothing of engines or speed; `widening` does the padding, `shards` the files.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch

from ..runtime.errors import InvalidDataError, UnsupportedModelError, UsageError
from ..runtime.experts.disk import explained, require_free
from ..runtime.models.checkpoint import Checkpoint
from ..runtime.models.loading import load_model
from ..runtime.models.origin import described
from ..runtime.speculation import shipped_predictor
from .shards import PlannedTensor, write_shards
from .widening import Fill, Filler, widen_matrix, widen_norm

MODEL_TYPE = "deepseek"
RECORD_NAME = "geometry.json"
# DeepSeek-MoE-16B: the dense layer's inner size beside an expert's.
DENSE_PER_EXPERT = 10944 / 1408
MAX_SHARD_BYTES = 4 << 30
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that are widened; everything else of the configuration stays."""

    hidden: int
    expert: int
    dense: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class GeometryReport:
    """What was written. `is_same_function`: every MoE layer of the source is there, once."""

    out: str
    source: str
    num_moe_layers: int
    is_same_function: bool
    sizes: Sizes
    tensors: int
    nbytes: int
    seconds: float
    seed: int

    def as_dict(self) -> dict[str, object]:
        """JSON of `outrider bench make-geometry --json`."""
        return asdict(self)


def make_geometry(
    source: Path,
    out: Path,
    *,
    hidden: int = 2048,
    expert: int = 1408,
    dense: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> GeometryReport:
    """Write the checkpoint in `source` into the empty folder `out`, widened.

    `hidden`, `expert` and `dense` are the new hidden size and inner sizes of a routed expert and of
    the dense layers. The hidden state is followed by zeros through the whole model: embeddings and
    the outputs of attention, experts and MLPs are zero there, and RMS norms carry weight / sqrt(r)
    with eps / r, r = hidden / old hidden, kept in fp32. Heads are added, never widened, since
    head_dim sets the rotary frequencies. Whatever then meets zeros only is random, no larger than
    the real weights of its row. In fp32 the tokens and the routing are the source's; in bf16 too
    where r is a power of 4, else up to the rounding of the scaled norm weights.

    `layers` MoE layers are kept, from the first; more than the source has repeat it from the
    start. Only with all of them once is the function the source's: fewer is its beginning, read
    out early, more runs its layers twice, and the text means nothing in either case, while
    routing stays as skewed and as predictable as a trained model's.

    Where the function is the source's, config.json names the source, so that its predictors serve
    the new model too, and the one shipped with it is copied.

    Holds one tensor of the source and a few MiB. Blocks; `progress(done_bytes, total_bytes)`.
    Raises UsageError for sizes that cannot be, InvalidDataError for a source that is not whole,
    OutriderError where `out` cannot be written.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if config.get("model_type") != MODEL_TYPE or config.get("moe_layer_freq", 1) != 1:
        raise UnsupportedModelError(
            f"{source}: only {MODEL_TYPE!r} checkpoints with an MoE layer after every other can be "
            f"widened; this one is {config.get('model_type')!r}"
        )
    sizes = _sizes(config, hidden=hidden, expert=expert, dense=dense)
    first = config["first_k_dense_replace"]
    num_source_layers = config["num_hidden_layers"] - first
    num_layers = num_source_layers if layers is None else layers
    if num_layers < 1:
        raise UsageError(f"layers: {num_layers}; at least one MoE layer is needed")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; name a folder that is, or does not exist yet")
    layer_sources = [*range(first), *(first + i % num_source_layers for i in range(num_layers))]
    plan = _plan(checkpoint, config, sizes, layer_sources=layer_sources, seed=seed)
    total = sum(tensor.nbytes for tensor in plan)
    with explained(out, needed_bytes=total):
        out.mkdir(parents=True, exist_ok=True)
        require_free(out, total)
        write_shards(out, plan, max_shard_bytes=MAX_SHARD_BYTES, progress=progress)
        is_same_function = num_layers == num_source_layers
        _copy_other_files(source, out, is_same_function=is_same_function)
        report = GeometryReport(
            out=str(out),
            source=str(source),
            num_moe_layers=num_layers,
            is_same_function=is_same_function,
            sizes=sizes,
            tensors=len(plan),
            nbytes=total,
            seconds=time.perf_counter() - began,
            seed=seed,
        )
        (out / RECORD_NAME).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        # Last, since a folder without it is not a model.
        widened = _config(config, sizes, num_hidden_layers=first + num_layers)
        if is_same_function:
            widened |= described(load_model(source).shape)
        (out / "config.json").write_text(json.dumps(widened, indent=2, sort_keys=True) + "\n")
    return report


def _sizes(config: Mapping, *, hidden: int, expert: int, dense: int | None) -> Sizes:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    group_dim = head_dim * (heads // kv_heads)
    dense = ceil(expert * DENSE_PER_EXPERT) if dense is None else dense
    smallest = {
        "hidden": config["hidden_size"],
        "expert": config["moe_intermediate_size"],
        "dense": config["intermediate_size"],
    }
    for (name, least), given in zip(smallest.items(), (hidden, expert, dense), strict=True):
        if given < least:
            raise UsageError(f"{name}: {given} is smaller than the source's {least}")
    if hidden % group_dim:
        raise UsageError(
            f"hidden: {hidden} is not made of whole groups of heads; give a multiple of {group_dim}"
        )
    kv_heads = max(kv_heads, hidden // group_dim)
    return Sizes(hidden, expert, dense, kv_heads * (group_dim // head_dim), kv_heads)


def _config(config: Mapping, sizes: Sizes, *, num_hidden_layers: int) -> dict:
    heads = config["num_attention_heads"]
    return {
        **config,
        "hidden_size": sizes.hidden,
        "moe_intermediate_size": sizes.expert,
        "intermediate_size": sizes.dense,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_hidden_layers": num_hidden_layers,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / sizes.hidden,
    }


def _plan(
    checkpoint: Checkpoint,
    config: Mapping,
    sizes: Sizes,
    *,
    layer_sources: list[int],
    seed: int,
) -> list[PlannedTensor]:
    """Every tensor of the new checkpoint, in the order of the model, and how it is made."""
    by_layer: dict[int | None, list[tuple[str, str]]] = {}
    for name in checkpoint.tensors:
        if _IGNORED.search(name):
            continue
        match = _LAYER.fullmatch(name)
        layer = None if match is None else int(match[1])
        by_layer.setdefault(layer, []).append((name, name if match is None else match[2]))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plan = []

    def add(source_name: str, name: str, leaf: str) -> None:
        record = checkpoint.tensors[source_name]
        shape, fill = _target(leaf, record.shape, sizes, config=config, head_dim=head_dim)
        if fill is Fill.NORM:
            dtype = torch.float32
            ratio = sizes.hidden / config["hidden_size"]
            chunks = partial(_norm, checkpoint, source_name, size=shape[0], ratio=ratio)
        else:
            dtype = record.dtype
            chunks = partial(
                _matrix, checkpoint, source_name, shape=shape, fill=fill, key=(seed, name)
            )
        if len(shape) != len(record.shape) or any(
            new < old for new, old in zip(shape, record.shape, strict=True)
        ):
            raise InvalidDataError(
                f"{record.file}: tensor {source_name!r} has shape {list(record.shape)}, which "
                f"config.json does not explain; widened it would be {list(shape)}"
            )
        plan.append(PlannedTensor(name, dtype, shape, chunks))

    def add_outer(prefix: str) -> None:
        for name, leaf in by_layer.get(None, []):
            if name.startswith(prefix):
                add(name, name, leaf)

    add_outer("model.embed_tokens.")
    for layer_idx, source_idx in enumerate(layer_sources):
        if source_idx not in by_layer:
            raise InvalidDataError(f"{checkpoint.folder}: no tensors of layer {source_idx}")
        for name, leaf in by_layer[source_idx]:
            add(name, f"model.layers.{layer_idx}.{leaf}", leaf)
    add_outer("model.norm.")
    add_outer("lm_head.")
    return plan


def _norm(checkpoint: Checkpoint, name: str, *, size: int, ratio: float) -> Iterator[torch.Tensor]:
    yield widen_norm(checkpoint.read(name), size, ratio=ratio)


def _matrix(
    checkpoint: Checkpoint, name: str, *, shape: tuple[int, ...], fill: Fill, key: tuple[int, str]
) -> Iterator[torch.Tensor]:
    yield from widen_matrix(checkpoint.read(name), shape, fill=fill, filler=Filler(*key))


def _target(
    leaf: str, shape: tuple[int, ...], sizes: Sizes, *, config: Mapping, head_dim: int
) -> tuple[tuple[int, ...], Fill]:
    """The widened shape of a tensor, by its name inside its layer, and what goes into the rest."""
    module, _, kind = leaf.rpartition(".")
    part = module.rpartition(".")[2]
    if module == "model.embed_tokens":
        return (shape[0], sizes.hidden), Fill.ZEROS
    if part.endswith("norm"):
        return (sizes.hidden,), Fill.NORM
    if module == "mlp.gate" or module == "lm_head":
        rows, columns = shape[0], sizes.hidden
    elif part in ("q_proj", "k_proj", "v_proj"):
        heads = sizes.heads if part == "q_proj" else sizes.kv_heads
        rows, columns = heads * head_dim, sizes.hidden
    elif part == "o_proj":
        rows, columns = sizes.hidden, sizes.heads * head_dim
    elif part in ("gate_proj", "up_proj", "down_proj"):
        inner = sizes.dense
        if module.startswith("mlp.experts."):
            inner = sizes.expert
        elif module.startswith("mlp.shared_experts."):
            inner = sizes.expert * config["n_shared_experts"]
        rows, columns = (sizes.hidden, inner) if part == "down_proj" else (inner, sizes.hidden)
    else:
        raise InvalidDataError(f"tensor {leaf!r} is none of a {MODEL_TYPE!r} checkpoint's")
    if kind == "bias":
        return (rows,), Fill.ZEROS
    return (rows, columns), Fill.RANDOM


def _copy_other_files(source: Path, out: Path, *, is_same_function: bool) -> None:
    for path in sorted(source.iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    predictor = shipped_predictor(source)
    if is_same_function and predictor is not None:
        shutil.copytree(predictor, out / predictor.name)
