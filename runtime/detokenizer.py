"""Token ids to text, one token at a time: whole characters only, and no part of a stop string.

Knows neither model nor request. A tokenizer is anything with `decode(ids, skip_special_tokens=)`.
"""

from collections.abc import Sequence
from typing import Protocol

_UNDECODABLE = "\ufffd"
# Tokens that may wait for a settled text before the window is cut: bounds the cost of a token. More
# than the bytes of a character, so that only what is no character is ever cut.
_MAX_HELD_TOKENS = 8
# Prompt tokens that the first generated token is decoded behind, enough for its leading space.
_NUM_CONTEXT_TOKENS = 6


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `tokenizers` and of transformers have it."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Streams one sequence's text; what it has returned is never taken back.

    `stop` strings end the text in front of the first one to be complete, of several complete at
    the same character in front of the longest: what comes out does not depend on how the text falls
    into tokens. With `prompt_token_ids` the first token is decoded as the prompt's continuation,
    keeping a leading space that some tokenizers drop at the start of a text.

    The text equals that of decoding all tokens at once for byte-level tokenizers, any bytes; for
    those with byte fallback, whose rule reaches back over a whole run of bytes, where each run is
    valid UTF-8.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        self._window = _TokenWindow(
            tokenizer, prompt_token_ids[-_NUM_CONTEXT_TOKENS:], skip_special_tokens
        )
        self._stops = _StopMatcher(stop)
        self._pieces: list[str] = []
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; the text ends in front of it."""
        return self._stops.matched

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token, often empty; empty once stopped.

        Raises `ValueError` after `finish`.
        """
        if self._finished:
            raise ValueError("push after finish: the text is complete")
        return "" if self.stopped else self._emit(self._stops.feed(self._window.push(token_id)))

    def finish(self) -> str:
        """The text held back at the end: bytes that are no character, and what became no stop."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        return self._emit(self._stops.feed(self._window.flush()) + self._stops.flush())

    def _emit(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


class _TokenWindow:
    """Decodes a short window of tokens: one settled group as context, then those not yet settled.

    `_ids[:_num_settled]` is the context, `_text` the window's text, and `_passed` how it begins:
    the context's text and what was handed on of the rest.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = [int(token_id) for token_id in context]
        self._num_settled = len(self._ids)
        self._text = self._passed = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        # Twice, since a space or a byte may vanish when it stands alone: a token without text (a
        # skipped special one) must not count as one of those that an open character waits behind.
        if text == self._text and not self._decode([self._ids[-1]] * 2):
            self._ids.pop()
            return ""
        self._text = text
        self._reconcile()
        # Any undecodable end may become a character, or several, with the next token.
        sure = self._text.rstrip(_UNDECODABLE)
        new = sure[len(self._passed) :]
        if new and len(sure) == len(self._text):
            self._advance()
            return new
        if new:
            self._passed = sure
        if len(self._ids) - self._num_settled > _MAX_HELD_TOKENS:
            new += self._shorten()
        return new

    def flush(self) -> str:
        new = self._text[len(self._passed) :]
        self._passed = self._text
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _reconcile(self) -> None:
        """Make `_text` begin with `_passed` again where the newest token changed earlier text."""
        if self._text.startswith(self._passed):
            return
        # The settled tokens ended inside a character, which this token goes on with.
        passed = self._passed.rstrip(_UNDECODABLE)
        if len(passed) < len(self._passed) and self._text.startswith(passed):
            self._passed = passed
        else:
            # Byte fallback decodes a whole run of bytes anew with each byte: forget the settled
            # ones.
            self._cut(self._num_settled)

    def _advance(self) -> None:
        """All tokens are settled: the newest group becomes the context."""
        self._cut(self._num_settled)
        self._num_settled = len(self._ids)
        self._passed = self._text

    def _cut(self, start: int) -> None:
        """Forget the tokens before `start`; none of the others is settled."""
        del self._ids[:start]
        self._num_settled = 0
        self._text = self._decode(self._ids)
        self._passed = ""

    def _shorten(self) -> str:
        """Cut the window where its text divides, and return what that settles."""
        for end in range(len(self._ids) - 1, self._num_settled, -1):
            head = self._decode(self._ids[:end])
            divides = head + self._decode(self._ids[end:]) == self._text
            if divides and head.startswith(self._passed):
                new = head[len(self._passed) :]
                self._cut(end)
                return new
        new = self._text[len(self._passed) :]
        self._advance()
        return new


class _StopMatcher:
    """Finds the first completed stop string, and holds back what may become one.

    One Knuth-Morris-Pratt automaton a stop string: its state is the length of the longest beginning
    of the string that the text ends with, so the text to hold back is the longest state.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = [(stop, _failure_lengths(stop)) for stop in stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched = False

    def feed(self, text: str) -> str:
        """The text that is certainly in front of any stop string; sets `matched` at the first."""
        if not self._stops:
            return text
        waiting = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = 0
            for index, (stop, failure) in enumerate(self._stops):
                state = self._states[index]
                while state and stop[state] != character:
                    state = failure[state - 1]
                state += stop[state] == character
                if state == len(stop):
                    complete = max(complete, state)
                self._states[index] = state
            if complete:
                self.matched = True
                self._held = ""
                return waiting[: end - complete]
        num_sure = len(waiting) - max(self._states)
        self._held = waiting[num_sure:]
        return waiting[:num_sure]

    def flush(self) -> str:
        """What was held back and has become no stop string."""
        held, self._held = self._held, ""
        return held


def _failure_lengths(stop: str) -> list[int]:
    """For each beginning of `stop` the longest shorter one it ends with (Knuth et al. 1977)."""
    lengths = [0] * len(stop)
    length = 0
    for end in range(1, len(stop)):
        while length and stop[length] != stop[end]:
            length = lengths[length - 1]
        length += stop[length] == stop[end]
        lengths[end] = length
    return lengths
