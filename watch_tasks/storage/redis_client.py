"""Opens a redis-py client by URL, with bounded waits and certificates that are checked; says its errors in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    ChildDeadlockedError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from ..errors import ConfigurationError, StorageError, StorageUnavailableError, did_you_mean

__all__ = ["FOREIGN", "Options", "mask", "open_client", "read_options", "translate"]

Options = dict[str, str]

#: Seconds that an answer, and a connection, may take: a server that hangs must not hang its clients.
_BOUNDS: Final[Mapping[str, Any]] = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0}
#: Seconds of silence after which a connection is tried before it is used.
_HEALTH_CHECK: Final = 10
_SENTINEL_PORT: Final = 26379

#: The roots of all that redis-py raises here.
FOREIGN: Final = (redis.RedisError, RedisClusterException, ChildDeadlockedError)
#: What is over when the server is back, free or writable again.
_AWAY: Final = (
    redis.ConnectionError,
    redis.TimeoutError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
#: The same, from inside a script (Redis 6.2 wraps them in a text), and codes that redis-py has no class for.
_AWAY_CODES: Final = re.compile(
    r"\b(OOM|READONLY|LOADING|MISCONF|NOREPLICAS|BUSY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN)\b(?! GROUP)"
)

#: How kombu and Celery spell what redis-py calls otherwise.
_CERT_REQS: Final = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}
_NUMBERS: Final = {
    "socket_timeout": float,
    "socket_connect_timeout": float,
    "health_check_interval": int,
    "max_connections": int,
}
_TLS: Final = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_SENTINEL: Final = ("master_name", "sentinel_username", "sentinel_password")
_KNOWN: Final = ("db", "virtual_host", *_NUMBERS, *_TLS, *_SENTINEL)


def open_client(url: str, *own: str, protocol: int = 2) -> redis.Redis:
    """Return a client for a URL; it connects at its first use.

    Args:
        url: `redis://[user:password@]host[:port][/db]` · `rediss://…` (TLS) · `redis+socket:///path` or
            `unix:///path`, with `?db=` or `?virtual_host=` · `sentinel://host[:port];sentinel://host[:port]/db`
            with `?master_name=`. The options `socket_timeout` (default 5 s), `socket_connect_timeout` (2 s),
            `health_check_interval` (10 s), `max_connections`, `ssl_…` and `sentinel_password` go with each.
        own: options of the URL that are the caller's own.
        protocol: of the server's wire: 3 has pushes, and costs a greeting at each connection.

    Raises:
        ConfigurationError: an option is unknown, lacking or cannot be read.
    """
    options = read_options(url)
    for name in own:
        options.pop(name, None)
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
        known = (*own, *_KNOWN)
        raise ConfigurationError(
            *(
                f"`{mask(url)}`: unknown option `{name}`{did_you_mean(name, known)} Known: {', '.join(known)}"
                for name in unknown
            )
        )
    scheme = url.partition("://")[0]
    try:
        if scheme == "sentinel":
            return _behind_sentinel(url, options, protocol)
        return _direct(urlsplit(url), options, protocol)
    except ValueError as exc:
        raise ConfigurationError(f"`{mask(url)}`: {exc}") from exc


def read_options(url: str) -> Options:
    """Return what follows the `?` of a URL."""
    return dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))


def mask(url: str) -> str:
    """Return the URL without its passwords, fit for logs and errors."""
    address, question, _ = url.partition("?")
    return ";".join(_mask_host(part) for part in address.split(";")) + (
        question and question + "&".join(f"{n}={'***' if 'password' in n else v}" for n, v in read_options(url).items())
    )


def _mask_host(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    login, at, host = rest.rpartition("@")
    user, colon, _ = login.partition(":")
    return f"{scheme}{separator}{user}{colon and ':***'}{at}{host}"


def _direct(url: SplitResult, options: Options, protocol: int) -> redis.Redis:
    settings = _settings(options, protocol)
    if url.scheme in ("unix", "redis+socket"):
        if not url.path.strip("/"):
            raise ValueError("names no socket: expected `unix:///path/of/the.sock`")
        place: dict[str, Any] = {"unix_socket_path": unquote(url.path), "db": _database("", options)}
        settings.pop("socket_keepalive")
    else:
        place = {"host": unquote(url.hostname or "localhost"), "port": _port(url) or 6379}
        place["db"] = _database(url.path, options)
        place["ssl"] = url.scheme == "rediss"
    return redis.Redis(**place, **_login(url), **settings)


def _behind_sentinel(url: str, options: Options, protocol: int) -> redis.Redis:
    master = options.get("master_name")
    if not master:
        raise ValueError("lacks the name of the master: add `?master_name=…`")
    hosts = [urlsplit(part if "://" in part else f"sentinel://{part}") for part in url.partition("?")[0].split(";")]
    login: dict[str, Any] = {}
    for host in hosts:
        login.update(_login(host))
    sentinels = {
        name: options[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in options
    }
    settings = _settings(options, protocol)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        [(unquote(host.hostname or "localhost"), _port(host) or _SENTINEL_PORT) for host in hosts],
        sentinel_kwargs={**_BOUNDS, **sentinels, "retry": _retry()},
        db=_database(hosts[-1].path, options),
        **login,
        **settings,
    )
    client: redis.Redis = sentinel.master_for(master)  # type: ignore[no-untyped-call]  # the same
    return client


def _port(url: SplitResult) -> int | None:
    try:
        return url.port
    except ValueError:
        # What urllib says quotes what it took for the port: perhaps the beginning of a password.
        raise ValueError("has no port that is a number; in a password, write `/`, `?`, `#` and `@` as %2F …") from None


def _settings(options: Options, protocol: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        **_BOUNDS,
        "socket_keepalive": True,
        "health_check_interval": _HEALTH_CHECK,
        "retry": _retry(),
        "protocol": protocol,
    }
    for name, kind in _NUMBERS.items():
        if name in options:
            try:
                settings[name] = kind(options[name])
            except ValueError as exc:
                raise ValueError(f"`{name}` must be a number, got {options[name]!r}") from exc
    settings.update((name, options[name]) for name in _TLS if name in options)
    if "ssl_cert_reqs" in settings:
        settings["ssl_cert_reqs"] = _CERT_REQS.get(settings["ssl_cert_reqs"], settings["ssl_cert_reqs"])
        if settings["ssl_cert_reqs"] not in _CERT_REQS.values():
            raise ValueError(f"`ssl_cert_reqs` must be required, optional or none, got {options['ssl_cert_reqs']!r}")
    if "ssl_check_hostname" in settings:
        settings["ssl_check_hostname"] = settings["ssl_check_hostname"].lower() not in ("0", "false", "no")
    return settings


def _retry() -> Retry:
    # A connection that broke while idle is opened anew, once. A timeout is not repeated: waits stay bounded.
    return Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))


def _login(url: SplitResult) -> dict[str, Any]:
    login = {"username": url.username, "password": url.password}
    return {name: unquote(value) for name, value in login.items() if value}


def _database(path: str, options: Options) -> int:
    text = options.get("db") or options.get("virtual_host") or path
    try:
        return int(text.strip("/") or 0)
    except ValueError:
        raise ValueError(f"the database must be a number, got {text!r}") from None


def translate(error: Exception, name: str) -> StorageError:
    """Return the error of ours that says the same as one of redis-py's."""
    text = f"storage `{name}`: {type(error).__name__}: {error}"
    if isinstance(error, _AWAY) or (isinstance(error, redis.ResponseError) and _AWAY_CODES.search(str(error))):
        return StorageUnavailableError(text)
    return StorageError(text)
