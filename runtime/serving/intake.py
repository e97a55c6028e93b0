"""Encodes prompts in a thread of its own, so that a long one holds up no running stream."""

import logging
import queue
import threading
from collections.abc import Callable
from itertools import count

from ..errors import OutriderError
from .backend import Backend
from .messages import Error, Generate
from .work import Key, error_of

logger = logging.getLogger(__name__)

# What is told of an encoded prompt: its ids, or why there are none.
Deliver = Callable[[Key, list[int] | Error], None]


class Intake:
    """Shortest prompts first: a megabyte of text takes seconds, and others would wait behind it."""

    def __init__(self, backend: Backend, deliver: Deliver) -> None:
        self._backend = backend
        self._deliver = deliver
        self._numbers = count()
        self._queue: queue.PriorityQueue[tuple[int, int, Key | None, Generate | None]] = (
            queue.PriorityQueue()
        )
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def put(self, key: Key, request: Generate) -> None:
        """Queue a prompt; the caller bounds how many."""
        self._queue.put((_size(request), next(self._numbers), key, request))

    def close(self) -> None:
        """End the thread once what it encodes now is done; does not wait for it."""
        self._queue.put((-1, next(self._numbers), None, None))

    def _run(self) -> None:
        while True:
            _, _, key, request = self._queue.get()
            if key is None or request is None:
                return
            self._deliver(key, self._encode(request))

    def _encode(self, request: Generate) -> list[int] | Error:
        try:
            return self._backend.encode(request)
        except OutriderError as error:
            return error_of(error)
        except Exception as error:  # a tokenizer is a program of the model's maker
            logger.exception("the prompt could not be encoded")
            return Error(code="internal", message=f"the tokenizer failed: {type(error).__name__}")


def _size(request: Generate) -> int:
    if request.messages is not None:
        return sum(len(message.content) for message in request.messages)
    return len(request.prompt or request.prompt_token_ids or ())
