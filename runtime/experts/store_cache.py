"""Where expert stores are kept between runs: found by the model's files, made once, reused.

Knows how to judge a store stale or damaged; not how one is read or written.
"""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import platformdirs

from ...collect.schema import ModelShape
from ..errors import InvalidDataError
from .identity import SourceIdentity
from .index import INDEX_NAME, SCHEMA_VERSION, read_index
from .pack import Layers, Progress, pack_store
from .store import ExpertStore

CACHE_VARIABLE = "OUTRIDER_CACHE"
_FINGERPRINT_DIGITS = 32


def cache_folder() -> Path:
    """The folder for stores: below $OUTRIDER_CACHE, else below the user's cache folder."""
    root = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("outrider", False)
    return Path(root).expanduser().absolute() / "experts"


def store_folder(fingerprint: str, fmt: str) -> Path:
    """Where the cache keeps the store of one checkpoint in one format."""
    return cache_folder() / f"{fingerprint[:_FINGERPRINT_DIGITS]}-{fmt}-v{SCHEMA_VERSION}"


def store_for(
    source: SourceIdentity,
    fmt: str,
    *,
    shape: ModelShape,
    layers: Layers,
    fingerprint: Callable[[], str],
    is_transposed: bool = False,
    at: Path | None = None,
    progress: Progress | None = None,
    on_wait: Callable[[Path], None] | None = None,
) -> ExpertStore:
    """The store of `source` in `fmt`: the one there is, or one that is packed now.

    `source.fingerprint` may be empty: a store whose recorded folder, names, sizes and mtimes are
    those of `source` is taken without reading the checkpoint. Where there is none, `fingerprint()`
    is called (it reads the checkpoint), and the store of that content is used, mended or packed in
    the cache. Processes that come here at once pack once; see `pack_store` for `layers`,
    `is_transposed`, `progress` and `on_wait`.

    With `at`, the store in that folder is used or refused (InvalidDataError with the reason: not a
    store, damaged, of another model or format), and never written to.
    """
    if at is not None:
        return _given_store(at, source, fmt, shape=shape, fingerprint=fingerprint)
    known = _by_files(source, fmt, shape=shape)
    if known is not None:
        return known
    source = msgspec.structs.replace(source, fingerprint=source.fingerprint or fingerprint())
    folder = store_folder(source.fingerprint, fmt)
    sound = _try_open(folder)
    is_usable = sound is not None and _mismatch(sound, source, fmt, shape=shape) is None
    if sound is not None and is_usable and not os.access(folder, os.W_OK):
        # Same content under other mtimes: the record would be renewed, but nobody can write it.
        return sound
    return pack_store(
        folder,
        shape=shape,
        fmt=fmt,
        layers=layers,
        source=source,
        is_transposed=is_transposed,
        overwrite=True,
        progress=progress,
        on_wait=on_wait,
    )


def _given_store(
    at: Path,
    source: SourceIdentity,
    fmt: str,
    *,
    shape: ModelShape,
    fingerprint: Callable[[], str],
) -> ExpertStore:
    store = ExpertStore(at)
    if store.source.files != source.files and not source.fingerprint:
        source = msgspec.structs.replace(source, fingerprint=fingerprint())
    elif not source.fingerprint:
        source = msgspec.structs.replace(source, fingerprint=store.source.fingerprint)
    reason = _mismatch(store, source, fmt, shape=shape)
    if reason is not None:
        raise InvalidDataError(f"the expert store {at} cannot serve this model: {reason}")
    return store


def _mismatch(
    store: ExpertStore, source: SourceIdentity, fmt: str, *, shape: ModelShape
) -> str | None:
    if store.format != fmt:
        return f"its format is {store.format}, wanted is {fmt}"
    if store.source.fingerprint != source.fingerprint:
        return (
            f"it was packed from other weights (fingerprint {store.source.fingerprint[:16]}, "
            f"the model's is {source.fingerprint[:16]}); pack the model again"
        )
    for field in ("num_moe_layers", "num_experts", "top_k", "hidden_size", "expert_size"):
        if getattr(store.shape, field) != getattr(shape, field):
            return (
                f"its {field} is {getattr(store.shape, field)}, the model's is "
                f"{getattr(shape, field)}"
            )
    return None


def _by_files(source: SourceIdentity, fmt: str, *, shape: ModelShape) -> ExpertStore | None:
    for path in sorted(cache_folder().glob(f"*-{fmt}-v{SCHEMA_VERSION}/{INDEX_NAME}")):
        try:
            recorded = read_index(path).source
        except (InvalidDataError, OSError):
            continue
        if (recorded.folder, recorded.files) == (source.folder, source.files):
            store = _try_open(path.parent)
            wanted = msgspec.structs.replace(source, fingerprint=recorded.fingerprint)
            if store is not None and _mismatch(store, wanted, fmt, shape=shape) is None:
                return store
    return None


def _try_open(folder: Path) -> ExpertStore | None:
    try:
        return ExpertStore(folder)
    except InvalidDataError:
        return None
