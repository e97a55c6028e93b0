"""How commands import what takes seconds: torch, transformers and the engine on top of them."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import inside: the cycle collector rests, and never looks at what was imported afterwards.

    The million objects that imports make live to the end. Looking through them while they are made
    takes a sixth of the time to the first token, and a full collection later would hold up some
    token for a fifth of a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        # Else what the extensions of others hold to the end is reported as leaked at exit.
        atexit.register(gc.unfreeze)
    finally:
        if was_enabled:
            gc.enable()
