"""Clients by URL: what each form means, what is refused, and that each really connects."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.servers import RedisServer, free_port
from watch_tasks.errors import ConfigurationError, StorageUnavailableError
from watch_tasks.storage import open_storage
from watch_tasks.storage.redis_client import mask, open_client
from watch_tasks.testing.storage_values import ask, handle


def _settings(url: str) -> dict[str, Any]:
    return dict(open_client(url).connection_pool.connection_kwargs)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", {"host": "localhost", "port": 6379, "db": 0}),
        ("redis://h:1/2", {"host": "h", "port": 1, "db": 2}),
        ("redis://h?db=3", {"host": "h", "db": 3}),
        ("redis://h?virtual_host=3", {"host": "h", "db": 3}),
        ("redis://:p%40ss@h", {"password": "p@ss", "username": None}),
        ("redis://user:pass@[::1]:1", {"username": "user", "password": "pass", "host": "::1"}),
        ("redis+socket:///run/redis.sock?virtual_host=3", {"path": "/run/redis.sock", "db": 3}),
        ("unix://:pass@/run/redis.sock?db=3", {"path": "/run/redis.sock", "db": 3, "password": "pass"}),
        ("redis://h?socket_timeout=0.5&health_check_interval=3", {"socket_timeout": 0.5, "health_check_interval": 3}),
    ],
)
def test_a_url_says_where_the_server_is(url: str, expected: dict[str, Any]) -> None:
    settings = _settings(url)

    assert {name: settings.get(name) for name in expected} == expected


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "sentinel://h?master_name=main"])
def test_every_wait_is_bounded(url: str) -> None:
    settings = _settings(url)

    assert (settings["socket_timeout"], settings["socket_connect_timeout"]) == (5.0, 2.0)
    assert settings["health_check_interval"] == 10


@pytest.mark.parametrize(
    ("option", "expected"),
    [("", "required"), ("?ssl_cert_reqs=CERT_REQUIRED", "required"), ("?ssl_cert_reqs=none", "none")],
)
def test_certificates_are_checked_unless_the_url_says_not_to(option: str, expected: str) -> None:
    client = open_client(f"rediss://h{option}")

    assert client.connection_pool.connection_class is redis.SSLConnection
    assert _settings(f"rediss://h{option}")["ssl_cert_reqs"] == expected


def test_sentinels_are_all_asked_for_the_master() -> None:
    pool: Any = open_client("sentinel://:p@one:1;sentinel://two/4?master_name=main&sentinel_password=q").connection_pool

    kwargs = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"], one["password"]) for one in kwargs] == [("one", 1, "q"), ("two", 26379, "q")]
    assert (pool.service_name, pool.connection_kwargs["db"], pool.connection_kwargs["password"]) == ("main", 4, "p")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://h?sokcet_timeout=1", "did you mean `socket_timeout`"),
        ("redis://h?socket_timeout=soon", "`socket_timeout` must be a number, got 'soon'"),
        ("redis://h/first", "the database must be a number, got '/first'"),
        ("redis://h:port", "redis://h:port"),
        ("rediss://h?ssl_cert_reqs=maybe", "required, optional or none, got 'maybe'"),
        ("unix://", "names no socket"),
        ("sentinel://h", "add `?master_name=…`"),
    ],
)
def test_what_a_url_lacks_is_said_at_once_without_its_password(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_storage(url.replace("//", "//:s3cret@", 1))

    assert complaint in str(caught.value).replace(":***@", "")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://h/0", "redis://h/0"),
        ("redis://user:pa:s@h/0", "redis://user:***@h/0"),
        ("redis://:p@h?db=1", "redis://:***@h?db=1"),
        ("sentinel://:p@a;sentinel://:p@b/0?master_name=m&sentinel_password=q",
         "sentinel://:***@a;sentinel://:***@b/0?master_name=m&sentinel_password=***"),
    ],
)  # fmt: skip
def test_a_masked_url_shows_no_password(url: str, masked: str) -> None:
    assert mask(url) == masked


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["unix", "redis+socket"])
def test_a_socket_is_reached(tmp_path_factory: pytest.TempPathFactory, scheme: str) -> None:
    folder = tmp_path_factory.mktemp("s")
    server = RedisServer(folder, unixsocket=str(folder / "s")).start()
    try:
        with open_storage(f"{scheme}://{folder}/s?db=1") as storage:
            handle(storage)
        with server.client() as client:
            assert "db1" in client.info("keyspace")
    finally:
        server.stop()


@pytest.mark.integration
def test_a_master_is_found_by_its_sentinel(own_valkey: RedisServer, redis_server: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {own_valkey.port} 1\n")
    sentinel = subprocess.Popen([redis_server.binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        _until_it_listens(port)
        with open_storage(f"sentinel://127.0.0.1:{port}?master_name=main") as storage:
            handle(storage)
            assert storage.len() == 1
        with (
            open_storage(f"sentinel://127.0.0.1:{port}?master_name=other") as lost,
            pytest.raises(StorageUnavailableError),
        ):
            lost.claim(ask())
    finally:
        sentinel.terminate()
        sentinel.wait(10)


@pytest.fixture
def with_tls(redis_server: RedisServer, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a server that speaks TLS only, and the certificate that it shows."""
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    server = subprocess.Popen(
        [redis_server.binary, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path),
         "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no", "--save", ""],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _until_it_listens(port)
        yield port, certificate
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.integration
def test_a_server_is_trusted_by_its_certificate_only(with_tls: tuple[int, Path]) -> None:
    port, certificate = with_tls

    with open_storage(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}") as storage:
        handle(storage)
        assert storage.len() == 1
    with open_storage(f"rediss://127.0.0.1:{port}/0") as storage, pytest.raises(StorageUnavailableError):
        storage.claim(ask())


def _until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.02)


def test_a_password_that_breaks_the_url_is_not_told() -> None:
    with pytest.raises(ConfigurationError, match="no port that is a number") as caught:
        open_storage("redis://:se/cret@localhost:6379/0")

    assert "cret" not in str(caught.value)
    assert "'se'" not in str(caught.value)
