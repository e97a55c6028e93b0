"""API keys: read from a file that only its owner can read, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from ...errors import UsageError

MIN_KEY_CHARS = 16
MAX_KEYS = 1024
_MAX_FILE_BYTES = 2**20


class ApiKeys:
    """The keys that are let in. Only their digests are kept, so no length shows in a comparison."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Keys of a file, one a line; empty lines and lines that begin with # are skipped.

        UsageError for a file that others may read, that is missing, empty or holds a key of fewer
        than 16 characters or with spaces in it; the message never shows a key.
        """
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"api-key-file: {path} is not a file")
            if mode & 0o077:
                raise UsageError(
                    f"api-key-file: {path} has mode {stat.S_IMODE(mode):04o}, so others may read "
                    f"it; chmod 600 {path}"
                )
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"api-key-file: {path} cannot be read as ASCII: {error}") from None
        keys = []
        for number, line in enumerate(content.splitlines(), start=1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if len(key) < MIN_KEY_CHARS or not key.isprintable() or " " in key:
                raise UsageError(
                    f"api-key-file: line {number} of {path} is no key: at least {MIN_KEY_CHARS} "
                    "printable characters without spaces are accepted; openssl rand -hex 32 "
                    "makes one"
                )
            keys.append(key)
        if not 1 <= len(keys) <= MAX_KEYS:
            raise UsageError(
                f"api-key-file: {path} holds {len(keys)} keys; 1 to {MAX_KEYS} are accepted"
            )
        return cls(keys)

    def admits(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries a key: as a bearer, or as a basic password.

        Browsers ask for the latter, which is how a person opens the page. The time taken depends
        on the number of keys only.
        """
        digest = hashlib.sha256(_presented(authorization).encode()).digest()
        is_known = False
        for known in self._digests:
            is_known |= hmac.compare_digest(digest, known)
        return is_known


def _presented(authorization: str | None) -> str:
    scheme, _, value = (authorization or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
