"""Who is let in: every path by every kind of credential, addresses, names, and the key file."""

import base64
import re
from pathlib import Path

import pytest
from served_gateway import exchange, run_gateway

from outrider.runtime.errors import UsageError
from outrider.runtime.serving.gateway.access import check_address, is_loopback
from outrider.runtime.serving.gateway.keys import ApiKeys

KEY, OTHER_KEY = "correct-horse-battery", "staple-staple-staple"
OPEN = ["/health"]
CLOSED = [
    "/", "/static/live.js", "/stats", "/ready", "/metrics", "/v1/models", "/v1/models/nano",
    "/v1/completions", "/v1/chat/completions", "/no/such/path", "/health/", "/healthz",
    "/docs", "/openapi.json", "/health%00",
]  # fmt: skip


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def locked():
    with run_gateway(keys=ApiKeys([KEY, OTHER_KEY])) as gateway:
        yield gateway


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", CLOSED)
def test_without_a_key_every_path_is_closed(locked, path, method):
    reply = locked.http.request(method, path)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Basic ")
    if method != "HEAD":
        assert reply.json()["error"]["code"] == "invalid_api_key"
    assert not locked.upstream.requests


@pytest.mark.parametrize(
    "target",
    ["/v1/../health", "/%2e%2e/health", "//health", "/health/../metrics", "/metrics?/health", "*",
     "http://localhost/metrics", "/health;x"],
)  # fmt: skip
def test_no_spelling_of_a_path_opens_another(locked, target):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    status, reply = exchange(locked.port, request.encode())
    assert status == 401 and b"outrider_" not in reply


@pytest.mark.parametrize("path", OPEN)
def test_health_is_open_and_says_nothing_else(locked, path):
    reply = locked.http.get(path)
    assert reply.status_code == 200 and reply.json() == {"status": "ok"}


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(f"Bearer {KEY}", id="bearer"),
        pytest.param(f"bearer  {OTHER_KEY}", id="another-key"),
        pytest.param(basic("anybody", KEY), id="basic"),
        pytest.param(basic("", KEY), id="basic-no-name"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/v1/models"])
def test_a_key_opens_every_path(locked, authorization, path):
    assert locked.http.get(path, headers={"authorization": authorization}).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param("", id="empty"),
        pytest.param(KEY, id="no-scheme"),
        pytest.param("Bearer", id="no-key"),
        pytest.param(f"Bearer {KEY[:-1]}", id="shorter"),
        pytest.param(f"Bearer {KEY}x", id="longer"),
        pytest.param(f"Bearer {KEY.upper()}", id="other-case"),
        pytest.param(f"Bearer {KEY} {OTHER_KEY}", id="both"),
        pytest.param(f"Digest {KEY}", id="other-scheme"),
        pytest.param(basic(KEY, ""), id="key-as-name"),
        pytest.param("Basic !!!", id="no-base64"),
        pytest.param("Basic " + base64.b64encode(b"\xff:\xff").decode(), id="no-text"),
        pytest.param(f"Bearer {KEY}\xe9", id="latin-1"),
    ],
)
def test_anything_else_opens_nothing(locked, authorization):
    headers = {"authorization": authorization.encode("latin-1")}
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


def test_a_key_is_not_taken_from_elsewhere(locked):
    assert locked.http.get(f"/v1/models?api_key={KEY}").status_code == 401
    assert locked.http.get("/v1/models", headers={"x-api-key": KEY}).status_code == 401
    assert locked.http.get("/v1/models", headers={"cookie": f"api_key={KEY}"}).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "localhost:1", "[::1]:1"])
def test_without_keys_this_machines_names_are_served(gateway, host):
    assert gateway.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["example.org", "evil.org:80", "127.0.0.1.evil.org", "", "10.0.0.1"]
)
def test_without_keys_other_names_are_refused(gateway, host):
    # A page of another site whose name was pointed at 127.0.0.1 sends its own name.
    reply = gateway.http.get("/v1/models", headers={"host": host})
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "host_not_allowed"


def test_with_keys_any_name_is_served(locked):
    headers = {"host": "example.org", "authorization": f"Bearer {KEY}"}
    assert locked.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    check_address(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "::ffff:10.0.0.1"])
def test_other_addresses_need_a_key(host):
    with pytest.raises(UsageError, match=re.escape(host)):
        check_address(host, has_keys=False)
    check_address(host, has_keys=True)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_file_may_hold_comments_and_several_keys(tmp_path):
    keys = ApiKeys.read(write(tmp_path / "keys", f"# ours\n{KEY}\n\n  {OTHER_KEY}  \n"))
    assert keys.admits(f"Bearer {KEY}") and keys.admits(f"Bearer {OTHER_KEY}")
    assert not keys.admits("Bearer # ours")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666])
def test_a_key_file_that_others_may_read_is_refused(tmp_path, mode):
    with pytest.raises(UsageError, match="chmod 600"):
        ApiKeys.read(write(tmp_path / "keys", KEY, mode))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("# nothing\n\n", id="comments-only"),
        pytest.param("short\n", id="short"),
        pytest.param("a key with spaces in it\n", id="spaces"),
        pytest.param("schlüssel-schlüssel\n", id="no-ascii"),
        pytest.param("control-\x07-character\n", id="control"),
        pytest.param(f"{KEY}-%d\n" * 1025, id="too-many"),
    ],
)
def test_a_key_file_without_proper_keys_is_refused(tmp_path, text):
    with pytest.raises(UsageError) as raised:
        ApiKeys.read(write(tmp_path / "keys", text))
    assert "api-key-file" in str(raised.value)
    assert "short" not in str(raised.value) and KEY not in str(raised.value)


def test_a_key_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="api-key-file"):
            ApiKeys.read(path)
