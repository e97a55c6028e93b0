"""The generation engine. Names are resolved on first use, so that importing this costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine import Engine
    from .errors import OutriderError
    from .generation import GenerationChunk, GenerationResult
    from .request import ChatMessage, GenerationRequest, SamplingParams

_DOOR = {
    "ChatMessage": "request",
    "Engine": "engine",
    "EngineConfig": "config",
    "GenerationChunk": "generation",
    "GenerationRequest": "request",
    "GenerationResult": "generation",
    "OutriderError": "errors",
    "SamplingParams": "request",
}

__all__ = [
    "ChatMessage",
    "Engine",
    "EngineConfig",
    "GenerationChunk",
    "GenerationRequest",
    "GenerationResult",
    "OutriderError",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_DOOR[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOOR})
