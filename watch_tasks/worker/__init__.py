"""Topics under a Celery app: as tasks that Celery workers run, with everything around them that keeps the promises."""

from __future__ import annotations

from typing import Any

from celery import Celery

from ..storage import Storage
from ..topics import Outlet, Topic, registry
from .runtime import runtime_of
from .settings import Settings, apply_recommended
from .task import register

__all__ = ["Settings", "install", "outlet_of", "settings_of", "storage_of"]


def install(app: Celery) -> Celery:
    """Make every topic a task of this app, those defined later too, and let them send through it.

    Adds our consumer, and our recommendations below whatever the app's own configuration says. Call it once, right
    after the app was made; its other tasks are left as they are.

    Returns:
        The app.
    """

    def configure(**_: Any) -> None:
        apply_recommended(app.conf)

    if app.configured:
        configure()
    else:
        app.on_after_configure.connect(configure, weak=False)

    def adopt(topic: Topic[Any]) -> None:
        register(app, topic)
        if not topic.is_bound:
            topic.bind(outlet_of(app))

    registry.subscribe(adopt)
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


def outlet_of(app: Celery) -> Outlet:
    """Return what topics send through under this app."""
    return runtime_of(app).outlet
