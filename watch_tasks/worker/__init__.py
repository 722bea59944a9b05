"""Topics under a Celery app: as tasks that Celery workers run, with everything around them that keeps the promises."""

from __future__ import annotations

from typing import Any, Final

from celery import Celery
from celery.signals import celeryd_init

from ..errors import ConfigurationError
from ..registry import registry
from ..sending import Outlet
from ..storage import Storage
from ..topics import Topic
from ..transport import install as install_transport
from .bulk import register_packets
from .runtime import runtime_of
from .settings import Settings, read_settings, recommended
from .task import register

__all__ = ["Settings", "install", "outlet_of", "settings_of", "storage_of", "urls_of"]

_MARK: Final = "_watch_installed"


def install(app: Celery) -> Celery:
    """Make every topic a task of this app, those defined later too, and let them send through it.

    Adds our consumer, and our recommendations below whatever the app's own configuration says; its other tasks are
    left as they are. Twice is safe.

    Returns:
        The app.
    """

    install_transport()
    if _MARK in app.__dict__:
        return app
    app.__dict__[_MARK] = True
    # A spawned child of the pool makes the app anew, and calls these on it.
    app.fixups = {*app.fixups, f"{__name__}:{install.__name__}"}

    def configure(**_: Any) -> None:
        app.conf.add_defaults(recommended(app.conf))

    if app.configured:
        configure()
    if app.on_after_configure is not None:
        # At each load: an app may be configured anew.
        app.on_after_configure.connect(configure, weak=False)
    else:  # a fixup is called before the app has its signals
        app.add_defaults(lambda: recommended(app.conf))

    def adopt(topic: Topic[Any]) -> None:
        register(app, topic)
        # With the first topic, not before: a spawned child's app cannot have tasks yet when it is installed.
        register_packets(app)
        if not topic.is_bound:
            topic.bind(outlet_of(app))

    registry.subscribe(adopt)

    def begin(instance: Any, **_: Any) -> None:
        if instance.app is app:
            from .checks import check_broker  # which loads what only workers need

            check_broker(app)

    celeryd_init.connect(begin, weak=False)
    return app


def settings_of(app: Celery) -> Settings:
    """Return our settings under this app.

    Raises:
        ConfigurationError: they cannot work; all complaints together.
    """
    return runtime_of(app).settings


def storage_of(app: Celery) -> Storage:
    """Return the storage of this app in this process, opened at its first use.

    Raises:
        ConfigurationError: the settings cannot work.
    """
    return runtime_of(app).storage


def urls_of(app: Celery) -> tuple[str, str]:
    """Return the URLs of the broker and of the storage of this app, as its settings are now.

    Raises:
        ConfigurationError: the settings cannot work, or the embedded server is the broker and does not run.
    """
    settings = read_settings(app.conf)
    missing = settings.missing_server()
    if missing:
        raise ConfigurationError(missing)
    return settings.broker_url, settings.storage_url


def outlet_of(app: Celery) -> Outlet:
    """Return what topics send through under this app."""
    return runtime_of(app).outlet
