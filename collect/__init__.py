"""Routing traces: taken from a ready model, kept on disk, read back, analysed.

Names resolve on first use, so that importing this package costs neither torch nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collection import CollectReport, Progress
    from .collector import collect
    from .corpora import open_corpora
    from .schema import ExpertKey, ModelShape
    from .settings import CollectSettings
    from .trace import Selection, TraceBatch, TraceReader, TraceRecord, TraceWriter, open_traces

_HOMES = {
    "CollectReport": "collection",
    "CollectSettings": "settings",
    "ExpertKey": "schema",
    "ModelShape": "schema",
    "Progress": "collection",
    "Selection": "trace",
    "TraceBatch": "trace",
    "TraceReader": "trace",
    "TraceRecord": "trace",
    "TraceWriter": "trace",
    "collect": "collector",
    "open_corpora": "corpora",
    "open_traces": "trace",
}

__all__ = [
    "CollectReport",
    "CollectSettings",
    "ExpertKey",
    "ModelShape",
    "Progress",
    "Selection",
    "TraceBatch",
    "TraceReader",
    "TraceRecord",
    "TraceWriter",
    "collect",
    "open_corpora",
    "open_traces",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
