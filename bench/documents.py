"""The forms of benchmark documents, one struct a kind: their JSON schema, and reading them back.

Fields may be added to a document; those named here are there, with these types.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..runtime.errors import InvalidDataError, UsageError
from .forms import (
    DecodeRow,
    FitRow,
    KernelRow,
    PredictionRow,
    ReplayRow,
    ServeRow,
    SimulatedRow,
    Surroundings,
    Timeline,
    TransferRow,
    ValidationRow,
)


class _Document(msgspec.Struct, kw_only=True):
    environment: Surroundings


class HitRate(_Document, kw_only=True):
    """`bench hit-rate`."""

    bench: Literal["hit-rate"]
    settings: dict[str, Any]
    rows: list[ReplayRow]


class Simulate(_Document, kw_only=True):
    """`bench simulate`."""

    bench: Literal["simulate"]
    simulated: Literal[True]
    settings: dict[str, Any]
    fit: FitRow
    rows: list[SimulatedRow]
    timelines: list[Timeline]


class Fits(_Document, kw_only=True):
    """`bench simulate --fit`."""

    bench: Literal["fit"]
    simulated: Literal[True]
    settings: dict[str, Any]
    rows: list[FitRow]


class Decode(_Document, kw_only=True):
    """`bench decode`."""

    workload: Any
    rows: list[DecodeRow]
    timelines: list[Timeline] = []


class Transfers(_Document, kw_only=True):
    """`bench transfer`."""

    bench: Literal["transfer"]
    settings: dict[str, Any]
    rows: list[TransferRow]


class Kernels(_Document, kw_only=True):
    """`bench kernels`."""

    device: str
    rows: list[KernelRow]


class Serve(_Document, kw_only=True):
    """`bench serve`."""

    bench: Literal["serve"]
    workload: dict[str, Any]
    server: dict[str, Any]
    idle_clients: dict[str, Any]
    rows: list[ServeRow]


class Validation(_Document, kw_only=True):
    """`bench validate`."""

    bench: Literal["validate"]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    worst_error: float
    median_error: float
    rows: list[ValidationRow]


class Prediction(_Document, kw_only=True):
    """`outrider evaluate`."""

    shape: dict[str, Any]
    workload: dict[str, Any]
    rows: list[PredictionRow]


KINDS: dict[str, type[_Document]] = {
    "hit-rate": HitRate,
    "simulate": Simulate,
    "fit": Fits,
    "decode": Decode,
    "transfer": Transfers,
    "kernels": Kernels,
    "serve": Serve,
    "validate": Validation,
    "evaluate": Prediction,
}

# A field that rows of one kind alone have, for documents that do not say what they are.
_TELLING = {"arm": "decode", "impl": "kernels", "moment": "evaluate"}


def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind. UsageError lists the kinds."""
    if kind not in KINDS:
        raise UsageError(f"kind {kind!r} is unknown; known ones: {', '.join(KINDS)}")
    return msgspec.json.schema(KINDS[kind])


def kind_of(document: Mapping[str, Any]) -> str | None:
    """Which kind a document says or shows that it is; None for none of ours."""
    if document.get("bench") in KINDS:
        return document["bench"]
    rows = document.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        return next((kind for field, kind in _TELLING.items() if field in rows[0]), None)
    return None


def check(document: Any, *, source: str) -> str:
    """The kind of a well-formed document with rows. InvalidDataError says where it is not."""
    if not isinstance(document, dict):
        raise InvalidDataError(f"{source}: expected an object, found {type(document).__name__}")
    kind = kind_of(document)
    if kind is None:
        raise InvalidDataError(
            f"{source}: not a result of a benchmark that outrider knows ({', '.join(KINDS)})"
        )
    try:
        msgspec.convert(document, KINDS[kind], strict=True)
    except msgspec.ValidationError as error:
        raise InvalidDataError(f"{source}: not a {kind} document: {error}") from error
    if not document["rows"]:
        raise InvalidDataError(f"{source}: a {kind} document without rows")
    return kind


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Kind and content of a result file.

    UsageError for a file that is not there, InvalidDataError for one that is not a result.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be read: {error.strerror or error}; results are made with "
            "--json > FILE"
        ) from error
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{path}: not JSON: {error}") from error
    return check(document, source=str(path)), document
