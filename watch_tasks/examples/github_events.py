"""GitHub's webhooks: a topic for every kind of event that GitHub documents, each delivery handled once.

Whatever receives the webhooks sends them on as they come, with nothing to look up:

    TOPICS[headers["X-GitHub-Event"]].send(body, index=headers["X-GitHub-Delivery"])

A delivery that is sent again keeps its id: `once="index"` handles it once.
Every handled event leaves one line in `github_events.jsonl` in the folder `WATCH_DIR` (default `.watch`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from watch_tasks import Message, Topic, topic

__all__ = ["EVENTS", "TOPICS", "journal"]

# Source of the names: GitHub Docs, "Webhook events and payloads", each edition.
_EVERYWHERE = """
    branch_protection_configuration branch_protection_rule check_run check_suite code_scanning_alert commit_comment
    create custom_property custom_property_values delete dependabot_alert deploy_key deployment
    deployment_protection_rule deployment_review deployment_status discussion discussion_comment fork
    github_app_authorization gollum installation installation_repositories installation_target issue_comment
    issue_dependencies issue_relates_to issues label marketplace_purchase member membership merge_group meta milestone
    org_block organization package page_build personal_access_token_request ping project project_card project_column
    projects_v2 projects_v2_item projects_v2_status_update public pull_request pull_request_review
    pull_request_review_comment pull_request_review_thread push registry_package release repository
    repository_advisory repository_dispatch repository_import repository_ruleset repository_vulnerability_alert
    secret_scanning_alert secret_scanning_alert_location secret_scanning_scan security_advisory security_and_analysis
    sponsorship star status sub_issues team team_add watch workflow_dispatch workflow_job workflow_run
"""
# GitHub Enterprise Cloud and Server; the last one is retired, but old hooks still name it.
_ENTERPRISE = """
    bypass_request_secret_scanning dismissal_request_code_scanning dismissal_request_dependabot
    dismissal_request_secret_scanning exemption_request_push_ruleset organization_custom_property
    organization_custom_property_values cache_sync enterprise user content_reference
"""

#: Names of the events, as GitHub sends them in the header `X-GitHub-Event`.
EVENTS: Final = (_EVERYWHERE + _ENTERPRISE).split()


# A schema names what the handlers use; fields it does not name are ignored, so GitHub may add what it likes.
# What `str` makes of one is the sentence in the journal.


@dataclass(frozen=True)
class Account:
    login: str


@dataclass(frozen=True)
class Repository:
    full_name: str


@dataclass(frozen=True, kw_only=True)
class Event:
    repository: Repository
    #: GitHub's own stand-in for accounts that are gone.
    sender: Account = Account("ghost")


@dataclass(frozen=True)
class Commit:
    id: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Push(Event):
    ref: str
    commits: list[Commit]
    deleted: bool = False

    def __str__(self) -> str:
        what = "deleted it" if self.deleted else f"pushed {len(self.commits)} commits"
        return f"{self.sender.login} {what}: {self.ref} of {self.repository.full_name}"


@dataclass(frozen=True)
class Issue:
    number: int
    title: str


@dataclass(frozen=True, kw_only=True)
class Issues(Event):
    action: str
    issue: Issue

    def __str__(self) -> str:
        return f"{self.sender.login} {self.action} {self.repository.full_name}#{self.issue.number}: {self.issue.title}"


@dataclass(frozen=True)
class Pull:
    number: int
    title: str
    merged: bool | None = None


@dataclass(frozen=True, kw_only=True)
class PullRequest(Event):
    action: str
    pull_request: Pull

    def __str__(self) -> str:
        pull, action = self.pull_request, self.action.replace("_", " ")
        what = "merged" if action == "closed" and pull.merged else action
        return f"{self.sender.login} {what} {self.repository.full_name}#{pull.number}: {pull.title}"


@dataclass(frozen=True, kw_only=True)
class Star(Event):
    action: str

    def __str__(self) -> str:
        what = "starred" if self.action == "created" else "unstarred"
        return f"{self.sender.login} {what} {self.repository.full_name}"


@dataclass(frozen=True)
class Ping:
    zen: str
    hook_id: int

    def __str__(self) -> str:
        return f"hook {self.hook_id} works: {self.zen}"


#: What is worth a shape of its own. Every other event has to be a JSON object, and no more.
SCHEMAS: Final[dict[str, Any]] = {
    "issues": Issues,
    "ping": Ping,
    "pull_request": PullRequest,
    "push": Push,
    "star": Star,
}

TOPICS: Final[dict[str, Topic[Any]]] = {
    name: topic(name, schema=SCHEMAS.get(name, dict[str, Any]), once="index") for name in EVENTS
}


def journal(message: Message[Any]) -> None:
    """Append what happened to the journal: one line, in one write, so that workers do not mix theirs."""
    line = {"event": message.topic, "delivery": message.index, "says": tell(message)}
    folder = Path(os.environ.get("WATCH_DIR", ".watch"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the embedded server lives there as well, and is private
    file = os.open(folder / "github_events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


def tell(message: Message[Any]) -> str:
    """Return a sentence about an event: its schema's own, else what nearly all events say of themselves."""
    data = message.data
    if message.topic in SCHEMAS:
        return str(data)
    who = (data.get("sender") or {}).get("login", "GitHub")
    what = f"{message.topic} {data.get('action') or ''}".replace("_", " ").strip()
    repository = data.get("repository")
    return f"{who}: {what} in {repository['full_name']}" if repository else f"{who}: {what}"


for each in TOPICS.values():
    each.handler(journal)
