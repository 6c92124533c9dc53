"""``python -m orchestrator`` is ``supsup``."""

from orchestrator.cli import main

main()
