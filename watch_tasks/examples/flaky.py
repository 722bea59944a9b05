"""A topic that fails on purpose, to watch retries and dead letters at work: `feed.py` sends some of it."""

from __future__ import annotations

from dataclasses import dataclass

from watch_tasks import Message, RetryPolicy, topic

__all__ = ["Job", "flaky"]


@dataclass(frozen=True)
class Job:
    """A job whose first tries fail."""

    name: str
    #: How many tries fail; more than the policy has retries, and the job ends as a dead letter.
    failures: int

    def index(self) -> str:
        return self.name


flaky = topic("demo.flaky", schema=Job, retry=RetryPolicy(max_retries=3, backoff=0.5), once="index")


@flaky.handler
def attempt(message: Message[Job]) -> None:
    """Fail as often as the job says."""
    if message.retries < message.data.failures:
        raise ConnectionError(f"try {message.retries + 1} of job {message.data.name}: nobody answered")
