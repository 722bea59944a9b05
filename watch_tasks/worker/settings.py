"""Our settings: what each means, where it is read, and all that is wrong with them at once.

Besides its own settings (`watch_…`) this module carries what is recommended of Celery's. Both are defaults: whatever
the user's configuration says wins, dict settings key by key.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kombu.utils.url import parse_url

from ..errors import ConfigurationError, did_you_mean
from ..queue.redis import transport_options
from . import embedded

__all__ = ["Settings", "read_settings", "recommended", "transport_leases"]

#: Schemes of brokers that can be the storage as well.
_REDIS: Final = ("redis", "rediss", "redis+socket", "unix", "sentinel")

#: What we recommend of Celery's own settings, where the user says nothing. Only what concerns a worker or a
#: connection as a whole: what concerns a task is set on our own tasks, so that others under the same app keep theirs.
_RECOMMENDED: Final[dict[str, Any]] = {
    "worker_consumer": "watch_tasks.worker.consumer:WatchConsumer",
    # Holds no more than what runs, unless all is quick: less to hand out again when a worker dies.
    "worker_prefetch_multiplier": 1,
    # The claim makes a second copy wait; cancelling would repeat effects that are half done.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    # Flower's live view.
    "worker_send_task_events": True,
    "broker_connection_retry_on_startup": True,
    # For ever: whoever supervises workers looks at their progress.
    "broker_connection_max_retries": None,
    # A Redis that is out of memory answers with an error; without this it ends the worker.
    "broker_channel_error_retry": True,
    # Seconds; without it a sender may wait for ever for one of the pool's connections.
    "broker_pool_acquire_timeout": 5.0,
    # Ends within about a second, so that a send is bounded.
    "task_publish_retry_policy": {"max_retries": 3, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Our settings, checked."""

    #: Where Celery reads and sends.
    broker_url: str
    #: What remembers; opened by URL. Unset: the broker, where that is Redis or Valkey.
    storage_url: str
    #: Folder of the embedded server and of what `watch-tasks up` leaves there.
    watch_dir: Path
    #: Seconds that a claim, and what the broker handed over, hold without renewal.
    lease: float = 6.0
    #: Seconds between two renewals.
    renew_every: float = 2.0
    #: How often a handler may take its worker down before the message is dead.
    max_crashes: int = 3
    #: Seconds that a message of an unknown topic is put back, for a deploy under way.
    unknown_grace: float = 60.0
    #: Bytes that data may take on the wire.
    max_payload: int = 1_048_576
    #: Seconds past its timeout after which a handler that cannot be cut off ends its process (prefork).
    kill_after: float = 5.0
    #: Seconds that a send waits for room in a queue with a bound.
    send_wait: float = 10.0

    def missing_server(self) -> str | None:
        """Return what to do where the embedded server is the broker and does not answer; None: nothing."""
        if self.broker_url != embedded.expected_url(self.watch_dir) or embedded.url_of(self.watch_dir):
            return None
        return (
            f"no broker is configured, and no embedded server answers in {self.watch_dir}: "
            "start it with `watch-tasks up`, or set `broker_url`"
        )


#: What is said of a broker's URL that is none. Nothing of it is shown: where it cannot be read, nobody knows what in it
#: is a password.
BROKER_URL: Final = "setting `broker_url` must be the URL of a broker, such as redis://localhost:6379/0"
UNREADABLE: Final = "it cannot be read; characters such as / and # in a password are written %2F and %23"


def check_broker_url(app: Any) -> None:
    """See that the URLs of an app's broker can be used. Nothing is connected to.

    Raises:
        ConfigurationError: a scheme is unknown, lacks its driver, or the rest cannot be read. The text has nothing of
            the URL but the scheme.
    """
    for connect in (app.connection_for_read, app.connection_for_write):
        try:
            with connect() as connection:
                connection.get_transport_cls()
        except (KeyError, ImportError, ValueError) as exc:
            scheme = _broker_of(app.conf).partition("://")[0]
            wrong = {
                KeyError: f"there is no transport `{scheme}`",
                ValueError: UNREADABLE,
            }.get(type(exc), f"transport `{scheme}` lacks its driver: {exc}")
            raise ConfigurationError(f"{BROKER_URL}: {wrong}") from exc


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _seconds(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError("seconds above 0")
    return number


def _whole(value: Any) -> int:
    if isinstance(value, (float, bool)) or int(value) < 1:
        raise ValueError("a whole number above 0")
    return int(value)


#: Setting in celeryconfig → field of Settings, what reads it, what it must be. In the environment: in capitals.
_OURS: Final[dict[str, tuple[str, Callable[[Any], Any], str]]] = {
    "watch_storage_backend": ("storage_url", _text, "a storage URL"),
    "watch_dir": ("watch_dir", lambda value: Path(_text(value)), "a folder"),
    "watch_lease": ("lease", _seconds, "seconds above 0"),
    "watch_renew_every": ("renew_every", _seconds, "seconds above 0"),
    "watch_max_crashes": ("max_crashes", _whole, "a whole number above 0"),
    "watch_unknown_grace": ("unknown_grace", _seconds, "seconds above 0"),
    "watch_max_payload": ("max_payload", _whole, "a number of bytes above 0"),
    "watch_kill_after": ("kill_after", _seconds, "seconds above 0"),
    "watch_send_wait": ("send_wait", _seconds, "seconds above 0"),
}


def watch_dir(conf: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the embedded server: `WATCH_DIR`, `watch_dir`, else `./.watch`."""
    return Path(environ.get("WATCH_DIR") or conf.get("watch_dir") or ".watch").absolute()


def read_settings(conf: Any, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return our settings from Celery's configuration and the environment, which wins.

    Raises:
        ConfigurationError: with every complaint there is.
    """
    complaints = []
    values: dict[str, Any] = {}
    for name in _names(conf, environ):
        if name not in _OURS:
            complaints.append(f"unknown setting `{name}`{did_you_mean(name, _OURS)}")
            continue
        field, read, expected = _OURS[name]
        value = environ.get(name.upper()) or conf.get(name)
        if value is None:
            continue
        try:
            values[field] = read(value)
        except (TypeError, ValueError):
            complaints.append(f"setting `{name}` must be {expected}, got {value!r}")
    values["watch_dir"] = watch_dir(conf, environ)
    values["broker_url"] = broker = _broker_of(conf)
    try:
        parse_url(broker)
    except ValueError:
        complaints.append(f"{BROKER_URL}: {UNREADABLE}")
    if "storage_url" not in values:
        if broker.partition("://")[0] in (*_REDIS, "memory"):
            values["storage_url"] = broker
        else:
            # Nothing of the URL is shown: it may hold a password.
            why = "the broker is neither Redis nor Valkey"
            if broker and "://" not in broker:
                why = "`broker_url` has no scheme such as redis:// and stands for a RabbitMQ"
            complaints.append(
                f"setting `watch_storage_backend` must name a storage: {why}, "
                "so it cannot be the storage as well; for instance redis://localhost:6379/0"
            )
    if values.get("renew_every", Settings.renew_every) * 2 > values.get("lease", Settings.lease):
        complaints.append("setting `watch_renew_every` must be at most half of `watch_lease`, so that one may fail")
    if complaints:
        raise ConfigurationError(*complaints)
    return Settings(**values)


def _names(conf: Any, environ: Mapping[str, str]) -> list[str]:
    given = {name for name in conf if isinstance(name, str) and name.startswith("watch_")}
    given |= {name.lower() for name in environ if name.startswith("WATCH_") and name.lower() in _OURS}
    return sorted(given)


def _broker_of(conf: Any) -> str:
    """Return the URL of the broker; of several to fall back on, the first."""
    urls = conf.broker_url or ""
    return str(urls if isinstance(urls, str) else urls[0]).partition(";")[0]


def recommended(conf: Any, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what we recommend of Celery's settings, without what the user's configuration says.

    A dict setting is whole: ours with the user's keys in it. Where no broker is configured, it is the embedded server
    of the watch folder.
    """
    ours = dict(_RECOMMENDED)
    if not environ.get("CELERY_BROKER_URL") and not any(
        conf.value_set_for(name) for name in ("broker_url", "broker_read_url", "broker_write_url", "broker_host")
    ):
        ours["broker_url"] = embedded.expected_url(watch_dir(conf, environ))
    broker = ours.get("broker_url") or _broker_of(conf)
    scheme = broker.partition("://")[0]
    if scheme in _REDIS:
        ours["broker_transport_options"] = transport_options()
    elif scheme in ("amqp", "amqps", "pyamqp"):
        # Without confirms the first messages after a restart of the broker vanish. They are waited for without end,
        # also by a worker's main process with its events, unless reading is bounded.
        ours["broker_transport_options"] = {"confirm_publish": True, "read_timeout": 5.0, "write_timeout": 5.0}
        # A connection that is dead without a word is noticed after three of these; by Celery's 120 s, after minutes.
        ours["broker_heartbeat"] = 6
    elif scheme == "memory":
        ours["broker_transport_options"] = {"polling_interval": 0.01}
    added = {}
    for name, value in ours.items():
        if isinstance(value, dict):
            added[name] = {**value, **(conf.get(name) or {} if conf.value_set_for(name) else {})}
        elif not conf.value_set_for(name):
            added[name] = value
    return added


def transport_leases(conf: Any, settings: Settings) -> dict[str, Any] | None:
    """Return the broker's transport options with the leases of our settings, or None where it has no leases."""
    if settings.broker_url.partition("://")[0] not in _REDIS:
        return None
    return {"lease": settings.lease, "renew_every": settings.renew_every, **(conf.broker_transport_options or {})}
