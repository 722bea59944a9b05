"""`watch-tasks scorecard`: the same measures on the user's own machine, with stock Celery beside."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .check import mask
from .codes import FAILED, PARTLY, REFUSED, USAGE, Command, CommandError
from .output import count, emit, note, table
from .program import Program, examples, with_program

if TYPE_CHECKING:
    from ..scorecard.contenders import Contender
    from ..scorecard.figures import Kill
    from ..scorecard.trial import Score

__all__ = ["scorecard"]

#: Names of those that can be measured.
NAMES: Final = ("watch_tasks", "bulk", "celery", "dramatiq")
#: Keys of a JSON line that are null for one that could not be measured.
FIGURES: Final = (
    "sent_per_second",
    "handled_per_second",
    "latency_rate",
    "latency_p50",
    "latency_p99",
    "sent",
    "in_hand",
    "waited",
    "not_handled",
    "duplicated",
    "begun_again",
    "recovery",
    "timeline",
)


@click.command(
    cls=Command,
    epilog=examples(
        "watch-tasks scorecard",
        "watch-tasks scorecard --plot kill.svg",
        "watch-tasks scorecard --only watch_tasks --only celery --json",
        "watch-tasks scorecard --scale 0.2",
        "watch-tasks scorecard --broker redis://localhost:6379/9",
    ),
)
@click.option("--only", multiple=True, type=click.Choice(NAMES), help="Who is measured. May be repeated. Default: all.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw it there too.")
@click.option(
    "--broker",
    metavar="URL",
    help="A Redis or Valkey of yours instead of an embedded one. The database must be empty, and is emptied.",
)
@click.option(
    "--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Processes that a worker has."
)
@click.option(
    "--wait",
    type=click.FloatRange(min=1),
    default=30,
    show_default=True,
    help="Seconds after the kill for which messages are waited for.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0.01, max=100),
    default=1,
    show_default=True,
    help="Measure for longer, or shorter.",
)
@with_program
def scorecard(
    program: Program,
    only: tuple[str, ...],
    plot: Path | None,
    broker: str | None,
    processes: int,
    wait: float,
    scale: float,
) -> None:
    """Measure on this machine, beside stock Celery.

    In about two minutes: messages a second, latency, and what a kill -9 costs, for messages sent one by one and in
    bulk, with Celery's own Redis transport beside it, and Dramatiq where it is installed. All run in a temporary
    folder, on an embedded Valkey of its own; no app, no configured broker and no .watch are touched.

    \b
    A JSON line for each:
      contender, version, processes
      sent_per_second, handled_per_second
      latency_rate, latency_p50, latency_p99    seconds from send to handled
      sent           messages around the kill
      in_hand        of which the killed worker had begun these
      waited         seconds that were waited for after the kill
      not_handled    not handled in that time
      duplicated     handled more than once, to the end
      begun_again    begun more than once
      recovery       seconds from the kill until all sent before it was handled
      timeline       {step, start, handled, late}: messages for each step
      machine, error

    Exit code 5: one of them could not be measured; 4: the database is not empty.
    """
    from ..scorecard.signals import Signals
    from ..scorecard.stage import ContenderError, open_stage
    from ..scorecard.trial import Sizes, try_out

    chosen = _chosen(only)
    if plot:
        _check_writable(plot)
    if broker:
        _check_empty(broker)
    sizes = Sizes(processes=processes, wait=wait).scaled(scale)
    begun = time.monotonic()
    scores = []
    with Signals() as signals, open_stage(signals, broker) as stage:
        machine = f"{_machine()}, {stage.server()}"
        for contender in chosen:
            fields: dict[str, Any] = {"contender": contender.name, "version": contender.version, "processes": processes}
            try:
                score = try_out(contender, stage, sizes, note)
            except ContenderError as exc:
                fields |= {**dict.fromkeys(FIGURES), "machine": machine, "error": str(exc)}
                _complain(contender, exc)
            else:
                scores.append(score)
                fields |= {**_figures(score), "machine": machine, "error": None}
            if program.as_json:
                emit(fields)
    if plot and scores:
        _draw(plot, scores)
    if scores and not program.as_json:
        _show(scores, wait)
        click.echo(f"\n{count(len(scores), 'contender')} in {time.monotonic() - begun:.0f} s: {machine}")
    if len(scores) < len(chosen):
        raise click.exceptions.Exit(PARTLY if scores else FAILED)


def _chosen(only: tuple[str, ...]) -> list[Contender]:
    """Return those to be measured, in their own order: those that were asked for, or all that are installed."""
    from ..scorecard.contenders import ALL

    missing = [one.distribution for one in ALL if one.name in only and not one.is_installed]
    if missing:
        raise CommandError(f"{missing[0]} is not installed: pip install '{missing[0]}[redis]'", USAGE)
    return [one for one in ALL if (one.name in only if only else one.is_installed)]


def _check_empty(broker: str) -> None:
    from ..scorecard.stage import count_keys

    url = mask(broker)
    if broker.partition("://")[0] not in ("redis", "rediss"):
        raise CommandError(f"`--broker` must be like redis://localhost:6379/9, got {url!r}", USAGE)
    keys = count_keys(broker)
    if keys:
        raise CommandError(
            f"{url} holds {count(keys, 'key')}, and a scorecard empties its database: name an empty one, "
            "such as redis://localhost:6379/9, or leave out --broker. Nothing was touched.",
            REFUSED,
        )


def _check_writable(file: Path) -> None:
    """See to it that two minutes are not spent on what cannot be kept."""
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise CommandError(f"`--plot`: {str(file)!r} cannot be written", USAGE)


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _complain(contender: Contender, error: Exception) -> None:
    for line in f"Error: {contender.label}: {error}".splitlines():
        note(line)


def _figures(score: Score) -> dict[str, Any]:
    """Return the figures as they stand in JSON."""
    from ..scorecard.figures import STEP

    fields = asdict(score)
    del fields["contender"]
    fields |= fields.pop("kill")
    fields["timeline"] = {"step": STEP, **fields["timeline"]}
    return {name: _rounded(fields[name]) for name in FIGURES}


def _show(scores: Sequence[Score], wait: float) -> None:
    """Print the table, and the bars below it."""
    from ..scorecard.figures import STEP

    kills = [score.kill for score in scores]
    rates = {f"{score.latency_rate:g}" for score in scores}
    rows: list[tuple[str, list[str | None]]] = [
        ("version", [score.contender.version for score in scores]),
        ("sent, messages a second", [_whole(score.sent_per_second) for score in scores]),
        ("handled, messages a second", [_whole(score.handled_per_second) for score in scores]),
        (f"send to handled at {', '.join(rates)}/s, p50", [_milliseconds(score.latency_p50) for score in scores]),
        ("the same, p99", [_milliseconds(score.latency_p99) for score in scores]),
        ("sent around the kill -9", [_whole(kill.sent) for kill in kills]),
        ("in hand of the killed worker", [_whole(kill.in_hand) for kill in kills]),
        (f"not handled within {wait:g} s of the kill", [_whole(kill.not_handled) for kill in kills]),
        ("handled more than once", [_whole(kill.duplicated) for kill in kills]),
        ("begun more than once", [_whole(kill.begun_again) for kill in kills]),
        ("recovery from the kill", [_recovery(kill.recovery, wait) for kill in kills]),
    ]
    titles = [score.contender.title for score in scores]
    table(["MEASURE", *titles], [[what, *cells] for what, cells in rows], right=titles)
    click.echo(f"\nhandled in each {STEP:g} s around the kill, which is at |\n")
    _show_bars(scores)
    others = [score.contender for score in scores if score.kill.not_handled and score.contender.comes_back]
    if others:
        click.echo("\nNot handled in time is not lost for ever. What a dead worker held is handed out again:")
    for contender in others:
        click.echo(f"  by {contender.label} {contender.comes_back}")


def _show_bars(scores: Sequence[Score]) -> None:
    from ..scorecard.plot import ASCII, BLOCKS, text_bars

    peak = max(max(score.kill.timeline.handled, default=0) for score in scores)
    width = max(len(score.contender.title) for score in scores)
    has_late = False
    for score in scores:
        bars, marks = text_bars(score.kill.timeline, peak, BLOCKS if _has_blocks(BLOCKS) else ASCII)
        click.echo(f"{score.contender.title:<{width}}  {bars}")
        if marks.strip():
            click.echo(f"{'':<{width}}  {marks}")
        has_late = has_late or "^" in marks
    if has_late:
        click.echo("^ here messages were handled that had been sent before the kill")


def _has_blocks(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _draw(file: Path, scores: Sequence[Score]) -> None:
    from ..scorecard.plot import Panel, draw

    panels = [
        Panel(
            name=f"{score.contender.label} ({score.contender.version})",
            verdict=_verdict(score.kill),
            timeline=score.kill.timeline,
        )
        for score in scores
    ]
    file.write_text(draw(panels), encoding="utf-8")


def _verdict(kill: Kill) -> str:
    if kill.not_handled:
        return f"{kill.not_handled} not handled within {kill.waited:g} s of the kill"
    return f"all handled, recovery {_recovery(kill.recovery, kill.waited)}"


def _whole(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1000:.1f} ms"


def _recovery(seconds: float | None, wait: float) -> str:
    return f"> {wait:g} s" if seconds is None else f"{seconds:.1f} s"


def _rounded(value: Any) -> Any:
    """Return a number to the microsecond, and anything else as it is."""
    return round(value, 6) if isinstance(value, float) else value
