"""The scorecard: what messages go through on this machine, under load and under a `kill -9`, beside stock Celery.

Everything runs in processes of its own, on a server of its own; what happened is read from files that the storage under
test has no part in. `watch-tasks scorecard` is the command for it.
"""
