"""This package's native libraries, where installation could build them."""

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

logger = logging.getLogger(__name__)


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """The library built as `name` beside this module; None without it, or if it cannot be loaded.

    A warning says what is wrong with it, once.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.exists():
            break
    else:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s cannot be used, Python does its work, slower: %s", path.name, error)
        return None
