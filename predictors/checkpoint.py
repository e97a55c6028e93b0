"""A trained predictor on disk: config.json and model.safetensors, written whole, read with doubt.

Knows files and identities; what the tensors mean is their family's own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from ..collect.durable import durable_write
from ..collect.schema import ModelShape
from .base import PredictorFactory, family_class
from .errors import FolderError, PredictorError, SettingsError

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_CONFIG_BYTES = 16 << 20
_RESERVED = ("format_version", "family", "shape", "weights")


class _Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nbytes: int
    checksum: str


class _Header(msgspec.Struct, frozen=True):
    format_version: int
    family: str
    shape: ModelShape
    weights: _Weights


def save_predictor(
    folder: Path,
    *,
    family: str,
    shape: ModelShape,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
) -> None:
    """Write a predictor; each file replaces its predecessor whole, and config.json comes last.

    config.json names the checksum of the weights it belongs to, so a crash between the two files
    is found when they are read. `config` is plain data, free of the names this module sets itself
    (ValueError). Blocks on the disk. FolderError where it refuses.
    """
    from safetensors.numpy import save

    taken = set(_RESERVED) & config.keys()
    if taken:
        raise ValueError(f"config has {sorted(taken)}, which the checkpoint sets itself")
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    document = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "shape": msgspec.to_builtins(shape),
        "weights": {"nbytes": len(data), "checksum": xxhash.xxh3_64_hexdigest(data)},
        **config,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with durable_write(folder / WEIGHTS_NAME) as file:
            file.write(data)
        with durable_write(folder / CONFIG_NAME) as file:
            file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise FolderError(
            f"the predictor cannot be written to {str(folder)!r} ({error.strerror or error}); "
            "make room or choose another folder"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a predictor's folder, its header checked. PredictorError names the field."""
    path = folder / CONFIG_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise PredictorError(
            f"{str(folder)!r} is not a predictor: {CONFIG_NAME} cannot be read "
            f"({error.strerror or error}); make one with `outrider train`"
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise PredictorError(f"{str(path)!r} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        header = msgspec.json.decode(raw, type=_Header)
        document = json.loads(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PredictorError(f"{str(path)!r} does not describe a predictor: {error}") from None
    if header.format_version != FORMAT_VERSION:
        raise PredictorError(
            f"{str(path)!r} has format version {header.format_version}; this version of outrider "
            f"reads {FORMAT_VERSION}"
        )
    return document


def load_predictor(folder: Path, shape: ModelShape | None = None) -> PredictorFactory:
    """The factory kept in `folder`; with `shape`, only if it was trained for that model.

    Reads and checks all bytes. PredictorError names file, field or difference.
    """
    folder = Path(folder)
    document = read_config(folder)
    own_shape = msgspec.convert(document["shape"], ModelShape)
    if shape is not None:
        refuse_other_model(own_shape, shape, folder)
    try:
        family = family_class(document["family"])
    except SettingsError as error:
        raise PredictorError(f"{str(folder / CONFIG_NAME)!r}: {error}") from None
    tensors = _read_weights(folder, msgspec.convert(document["weights"], _Weights))
    config = {name: value for name, value in document.items() if name not in _RESERVED}
    try:
        return family.from_state(tensors, config, own_shape)
    except PredictorError as error:
        raise PredictorError(f"{str(folder)!r}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PredictorError(
            f"{str(folder)!r} does not hold a {document['family']} predictor ({reason})"
        ) from None


def refuse_other_model(trained: ModelShape, model: ModelShape, folder: Path) -> None:
    """PredictorError naming each difference between the predictor's model and this one.

    Sizes of an expert may differ, which no predictor reads; an empty fingerprint fits all.
    """
    differences = []
    for name in ModelShape.__slots__:
        own, other = getattr(trained, name), getattr(model, name)
        is_unknown = name == "fingerprint" and not (own and other)
        if own != other and not is_unknown and name != "expert_size":
            differences.append(f"{name} is {own!r}, the model's is {other!r}")
    if differences:
        raise PredictorError(
            f"predictor {str(folder)!r} was trained for another model: {'; '.join(differences)}; "
            "train one on traces of this model"
        )


def take(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The tensor `name` of that shape (None: any size). PredictorError names what differs."""
    tensor = tensors.get(name)
    if tensor is None:
        raise PredictorError(f"tensor {name!r} is missing")
    fits = tensor.ndim == len(shape) and all(
        size in (None, own) for size, own in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise PredictorError(f"tensor {name!r} has shape {tensor.shape}, expected {shape}")
    return tensor


def _read_weights(folder: Path, weights: _Weights) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / WEIGHTS_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PredictorError(f"{str(path)!r} cannot be read ({error.strerror or error})") from None
    checksum = xxhash.xxh3_64_hexdigest(data)
    if checksum != weights.checksum:
        raise PredictorError(
            f"{str(path)!r} is damaged: {len(data)} bytes with checksum {checksum}, config.json "
            f"says {weights.nbytes} with {weights.checksum}; train it again, or copy it again"
        )
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise PredictorError(f"{str(path)!r} is no safetensors file: {error}") from None
