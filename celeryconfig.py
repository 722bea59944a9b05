"""The configuration of this checkout: which topics its workers handle. Everything else is as the package sets it."""

imports = (
    "watch_tasks.examples.github_events",
    "watch_tasks.examples.flaky",
)
