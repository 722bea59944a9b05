"""`python -m watch_tasks`: the command line."""

from .cli import main

main()
