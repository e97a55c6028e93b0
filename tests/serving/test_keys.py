"""CURVE keys: who is let in, what reaches the decoder, and files that others could read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import served_double
import wire as by_hand
import zmq
from served_double import PATIENT, answer
from wire import PING

from outrider.runtime.errors import OutriderError, UsageError
from outrider.runtime.request import GenerationRequest
from outrider.runtime.serving import endpoint
from outrider.runtime.serving.client import Client
from outrider.runtime.serving.keys import client_keys, make_keys, server_keys
from outrider.runtime.serving.transport import check_library

OUTRIDER = Path(sys.executable).with_name("outrider")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k")
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = served_double.start(
        tmp_path_factory.mktemp("s"), address="tcp://127.0.0.1:0", keys=str(folder)
    )
    yield server
    server.kill()


def stats(server, folder) -> dict:
    with Client(server.address, timeout_s=120, keys=folder, options=PATIENT) as client:
        found = client.stats()
    return {"connections": found.connections_total, "rejected": found.rejected_total}


def curve(pair) -> dict[str, bytes]:
    return {
        "CURVE_PUBLICKEY": pair.public,
        "CURVE_SECRETKEY": pair.secret,
        "CURVE_SERVERKEY": pair.server,
    }


def test_a_listed_key_is_served(server, folder):
    request = GenerationRequest(prompt="with a key", max_tokens=5, stream=True)
    with Client(server.address, timeout_s=120, keys=folder, options=PATIENT) as client:
        items = list(client.generate(request))
    tokens = b"".join(bytes(item.token_ids) for item in items[:-1])
    assert tokens == answer("with a key", 5)


def test_the_commands_make_keys_and_ask_with_them(server, folder, tmp_path):
    made = subprocess.run(
        [OUTRIDER, "serve", "--make-keys", tmp_path / "new"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert {Path(line).name for line in made.stdout.splitlines()} == {
        "server.key", "server.key_secret", "client.key", "client.key_secret"
    }  # fmt: skip
    ask = [OUTRIDER, "ask", "--connect", server.address, "--prompt", "keyed", "--max-tokens", "6"]
    done = subprocess.run([*ask, "--keys", folder], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, answer("keyed", 6).decode() + "\n")
    refused = subprocess.run([*ask, "--timeout", "1"], capture_output=True, text=True, timeout=280)
    assert refused.returncode == 1 and refused.stdout == ""
    assert "that the keys are the right ones" in refused.stderr


def test_nobody_else_reaches_the_decoder(server, folder, tmp_path_factory):
    before = stats(server, folder)
    # A key of its own that is not on the list, with the server's true public key.
    other = tmp_path_factory.mktemp("k")
    make_keys(other)
    stranger = client_keys(other)._replace(server=client_keys(folder).server)
    for options in (curve(stranger), {}):
        with by_hand.wire(server.address, **options) as one:
            one.send(PING, b"p")
            one.socket.send_multipart([b"rubbish"] * 7)
            assert one.socket.poll(1500) == 0
    after = stats(server, folder)
    assert after["rejected"] == before["rejected"] == {}
    connections = after["connections"], before["connections"]
    refused = [sum(one[name] for name in one if name.startswith("handshake_") and
                   name != "handshake_succeeded") for one in connections]  # fmt: skip
    assert refused[0] > refused[1]


def test_a_server_that_would_let_nobody_in_is_refused(tmp_path_factory):
    keys = tmp_path_factory.mktemp("k")
    make_keys(keys)
    for file in (keys / "allowed").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="allowed"):
        server_keys(keys)


def test_keys_that_others_could_read_are_refused(tmp_path):
    made = make_keys(tmp_path / "keys")
    secrets = [file for file in made if file.suffix.endswith("secret")]
    assert len(secrets) == 2
    for file in secrets:
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o640)
    with pytest.raises(UsageError, match=r"0640.*accepted is 0600"):
        server_keys(tmp_path / "keys")
    with pytest.raises(UsageError, match=r"0640.*accepted is 0600"):
        client_keys(tmp_path / "keys")


def test_keys_are_never_made_over_others(tmp_path):
    make_keys(tmp_path / "keys")
    with pytest.raises(UsageError, match="is there already"):
        make_keys(tmp_path / "keys")


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://10.0.0.1:1"])
def test_an_address_that_others_reach_needs_keys(address):
    with pytest.raises(UsageError, match="--keys"):
        endpoint.refuse_exposed(endpoint.parse(address), has_keys=False)
    endpoint.refuse_exposed(endpoint.parse(address), has_keys=True)


@pytest.mark.parametrize(
    "address", ["tcp://*:5555", "tcp://example.org:5555", "ipc://@name", "ipc://relative", "inproc://x",
                "tcp://127.0.0.1:99999", "ipc:///" + "x" * 200, ""],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_with_what_is_accepted(address):
    with pytest.raises(UsageError, match=r"ipc:///|shorter"):
        endpoint.parse(address)


@pytest.mark.parametrize(
    "arguments", [["--bind", "tcp://0.0.0.0:5555"], ["--keys", "/nowhere"], ["--bind", "http://x"]]
)
def test_serve_refuses_in_one_line_before_it_loads_a_model(arguments):
    command = [OUTRIDER, "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=280)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("outrider: ") and done.stderr.count("\n") == 1


def test_without_a_runtime_folder_the_socket_lies_in_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert endpoint.default_address() == "ipc:///run/user/7/outrider/engine.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert endpoint.default_address() == f"ipc://{tmp_path}/outrider/engine.sock"


def test_a_libzmq_with_known_holes_is_refused(monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(OutriderError, match=r"4\.3\.5 or newer"):
        check_library()
