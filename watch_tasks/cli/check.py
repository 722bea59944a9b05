"""`watch-tasks check`: whether everything is as it should be, and what to do where it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

import click

from ..errors import ConfigurationError, QueueUnavailableError, StorageError
from .codes import FAILED, UNREACHABLE, Command
from .output import count, emit, listed, table
from .program import Program, examples, with_program
from .topics import waiting_in

__all__ = ["check", "mask"]

#: Seconds that workers have to say that they are there.
PATIENCE: Final = 1.0

_PASSWORD: Final = re.compile(r"(://[^:/@;]*):[^;]*@")
_PASSWORD_FIELD: Final = re.compile(r"(?i)([?&][^=&;]*pass[^=&;]*)=[^&;]*")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    ok: bool
    detail: str
    #: What to do; None where it is ok.
    fix: str | None = None
    #: Whether a server did not answer.
    is_unreachable: bool = False


@click.command(cls=Command, epilog=examples("watch-tasks check", "watch-tasks check -I alerts --json"))
@with_program
def check(program: Program) -> None:
    """Check settings, broker, storage and topics.

    Workers that answer are named too; that none does is no fault.

    Exit code 1: something is not ok; 69: the broker or the storage does not answer.
    """
    findings = []
    for finding in _findings(program):
        findings.append(finding)
        if program.as_json:
            fields = asdict(finding)
            del fields["is_unreachable"]
            emit(fields)
    bad = [finding for finding in findings if not finding.ok]
    if not program.as_json:
        rows = [(found.check, "ok" if found.ok else "NOT OK", found.detail, found.fix) for found in findings]
        table(("CHECK", "STATE", "DETAIL", "FIX"), rows)
        click.echo(f"{count(len(findings), 'check')}, {len(bad)} not ok")
    if bad:
        raise click.exceptions.Exit(UNREACHABLE if any(found.is_unreachable for found in bad) else FAILED)


def mask(url: str) -> str:
    """Return a URL, or several with `;` between them, without passwords."""
    return _PASSWORD_FIELD.sub(r"\1=**", _PASSWORD.sub(r"\1:**@", url))


def _findings(program: Program) -> Iterator[Finding]:
    is_fit = True
    for finding in _settings(program):
        is_fit = is_fit and finding.ok
        yield finding
    broker = _broker(program)
    yield broker
    if is_fit and (broker.ok or program.settings.storage_url != program.app.conf.broker_url):
        yield from _storage(program)
    yield from _topics(program)
    if broker.ok:
        yield _workers(program)


def _settings(program: Program) -> Iterator[Finding]:
    try:
        settings = program.settings
    except ConfigurationError as exc:
        for complaint in exc.complaints:
            yield Finding("settings", False, complaint, "mend it in celeryconfig.py or in the environment")
    else:
        yield Finding("settings", True, f"WATCH_DIR is {settings.watch_dir}")


def _broker(program: Program) -> Finding:
    url = mask(program.app.conf.broker_url or "")
    try:
        program.require_broker_url()
        program.require_server()
        waiting_in(program.app, {program.app.conf.task_default_queue})
    except QueueUnavailableError as exc:
        fix = "start it, or name another in CELERY_BROKER_URL; `watch-tasks up` brings its own"
        return Finding("broker", False, f"{url}: {mask(str(exc.__cause__ or exc))}", fix, is_unreachable=True)
    except ConfigurationError as exc:
        return Finding("broker", False, f"{url}: {exc}", "mend it in celeryconfig.py or in CELERY_BROKER_URL")
    return Finding("broker", True, url)


def _storage(program: Program) -> Iterator[Finding]:
    url = mask(program.settings.storage_url)
    try:
        storage = program.storage
        storage.topics()
        found = storage.check()
    except (StorageError, QueueUnavailableError) as exc:
        fix = "start it, or name another in WATCH_STORAGE_BACKEND"
        yield Finding("storage", False, mask(str(exc)), fix, is_unreachable=True)
        return
    except ConfigurationError as exc:
        yield Finding("storage", False, mask(str(exc)), "name another in WATCH_STORAGE_BACKEND")
        return
    yield Finding("storage", True, url)
    for name, ok, detail, fix in found:
        yield Finding(name, ok, detail, fix or None)


def _topics(program: Program) -> Iterator[Finding]:
    loaded = program.load_topics()
    for topic in loaded:
        if not topic.handlers:
            fix = f"decorate a function of its module with the topic's `handler`, or remove topic `{topic.name}`"
            yield Finding("topics", False, f"topic `{topic.name}` has no handlers", fix)
    names = listed([topic.name for topic in loaded])
    yield Finding(
        "topics", True, f"loaded: {names}" if names else "none loaded: name a module with -I, or in `imports`"
    )


def _workers(program: Program) -> Finding:
    """Say who answers. Nobody is no fault: a machine that only sends has no workers to see."""
    answers = program.app.control.ping(timeout=PATIENCE) or []
    names = sorted(name for answer in answers for name in answer)
    return Finding("workers", True, ", ".join(names) or f"none answered within {PATIENCE:g} s")
