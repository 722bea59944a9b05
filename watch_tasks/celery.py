"""The default app: what `celery -A watch_tasks worker` and `celery -A watch_tasks flower` find.

Reads `celeryconfig.py` of the current folder, if there is one; whatever that says wins over our recommendations.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from celery import Celery
from celery.loaders.default import DEFAULT_CONFIG_MODULE
from celery.loaders.default import Loader as DefaultLoader
from celery.utils.imports import cwd_in_path

from .worker import install
from .worker.running import running_modules
from .worker.settings import watch_dir

__all__ = ["app"]

# Flower listens on every interface, and asks nobody for a login, unless it is told otherwise.
os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")
# Its list of tasks shows neither the index, which is in the keywords, nor what became of a message.
os.environ.setdefault("FLOWER_TASKS_COLUMNS", "name,kwargs,state,result,retries,received,runtime,worker,uuid")


class Loader(DefaultLoader):
    """Celery's default loader, which must not take a configuration that fails to import for none at all."""

    def read_configuration(self, fail_silently: bool = True) -> Any:
        name = os.environ.get("CELERY_CONFIG_MODULE", DEFAULT_CONFIG_MODULE)
        with cwd_in_path():
            exists = find_spec(name) is not None
        conf = super().read_configuration(fail_silently=False) if exists else {}
        if not conf.get("imports") and not conf.get("include"):
            # No topics named: those of the `watch-tasks up` that runs here.
            conf["imports"] = running_modules(watch_dir(conf))
        return conf


app: Celery = install(Celery("watch_tasks", loader=Loader, set_as_current=True))
