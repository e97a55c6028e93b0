"""`make fuzz`: the decoder under atheris. Any exception but a refusal is a find.

Begins with valid messages, so that mutations reach the fields. Arguments are libFuzzer's.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["outrider.runtime"]):
    from outrider.runtime.request import ChatMessage
    from outrider.runtime.serving.messages import (
        CLIENT_TYPES,
        Credit,
        Generate,
        Hello,
        ProtocolError,
        decode_client,
        decode_server,
        encode,
    )

SEEDS = [
    Generate(prompt="The film was", max_tokens=9, stop=["END"], temperature=0.5, stream=True),
    Generate(messages=[ChatMessage(role="user", content="hello")], max_tokens=1, credit=3),
    Generate(prompt_token_ids=[1, 2, 3], logprobs=2, seed=7),
    Credit(chunks=5),
    Hello(client="x"),
]


def one_input(data: bytes) -> None:
    """The first byte picks a type, the rest is the body."""
    kinds = list(CLIENT_TYPES)
    header = bytes([1, kinds[data[0] % len(kinds)]]) if data else b""
    for decode in (decode_client, decode_server):
        for frames in ([header, b"id", data[1:]], [data[:2], data[2:6], data[6:]]):
            try:
                _, message = decode(frames)
            except ProtocolError as error:
                encode(error.error, error.request_id)
            else:
                encode(message, b"id")


def main() -> None:
    """Fuzz until libFuzzer is told to stop."""
    with tempfile.TemporaryDirectory() as corpus:
        for place, message in enumerate(SEEDS):
            header, _, body = encode(message, b"")
            seed = bytes([list(CLIENT_TYPES).index(header[1])]) + body
            (Path(corpus) / str(place)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
