"""CURVE keys in files: made once, for their owner's eyes only, and refused if others may read them.

DIR/server.key_secret and DIR/allowed/ are the server's; a client needs DIR/client.key_secret and
DIR/server.key, and its own public key in the server's DIR/allowed/.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

import zmq.auth

from ..errors import UsageError

ALLOWED = "allowed"


class ServerKeys(NamedTuple):
    """A server's key pair (Z85) and the folder of the public keys that it lets in."""

    public: bytes
    secret: bytes
    allowed: Path


class ClientKeys(NamedTuple):
    """A client's key pair and the public key of the server it trusts, all Z85."""

    public: bytes
    secret: bytes
    server: bytes


def make_keys(folder: Path) -> list[Path]:
    """Write a server's and a client's key pair, the client allowed; returns the files.

    Raises UsageError if any of them is there already: a key is never overwritten.
    """
    allowed = folder / ALLOWED
    names = [f"{who}.{kind}" for who in ("server", "client") for kind in ("key", "key_secret")]
    files = [*(folder / name for name in names), allowed / "client.key"]
    for file in files:
        if file.exists():
            raise UsageError(f"make_keys: {file} is there already; remove it or give a new folder")
    # The files are never readable by others, not even while they are written.
    before = os.umask(0o077)
    try:
        allowed.mkdir(mode=0o700, parents=True, exist_ok=True)
        for who in ("server", "client"):
            zmq.auth.create_certificates(folder, who)
        files[-1].write_bytes((folder / "client.key").read_bytes())
    finally:
        os.umask(before)
    return files


def server_keys(folder: Path) -> ServerKeys:
    """The server's keys. Raises UsageError: missing, readable by others, or nobody is allowed."""
    public, secret = _key_pair(folder / "server.key_secret")
    allowed = folder / ALLOWED
    if not any(allowed.glob("*.key")):
        raise UsageError(
            f"keys: {allowed} holds no *.key file: put the public keys of the clients that may "
            "connect there (CURVE without such a list would let every key in)"
        )
    _refuse_writable(allowed)
    for file in allowed.glob("*.key"):
        _load(file)
    return ServerKeys(public, secret, allowed)


def client_keys(folder: Path) -> ClientKeys:
    """A client's keys. Raises UsageError if they are missing or readable by others."""
    public, secret = _key_pair(folder / "client.key_secret")
    server, _ = _load(folder / "server.key")
    return ClientKeys(public, secret, server)


def _key_pair(file: Path) -> tuple[bytes, bytes]:
    public, secret = _load(file)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise UsageError(
            f"keys: {file} has mode {mode:04o}, so others may read it: accepted is 0600; "
            f"run chmod 600 {file}, and make new keys if somebody may have read it"
        )
    if secret is None:
        raise UsageError(f"keys: {file} holds no secret key; outrider serve --make-keys makes one")
    return public, secret


def _refuse_writable(folder: Path) -> None:
    if stat.S_IMODE(folder.stat().st_mode) & 0o022:
        raise UsageError(f"keys: others may write to {folder}, and so let themselves in: chmod 700")


def _load(file: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"keys: {file} cannot be read as a key: {error}; outrider serve --make-keys makes them"
        ) from None
