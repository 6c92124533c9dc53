"""Sweeps: ablations and searches, planned, scheduled over one cluster, and compared."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Load ``run`` when it is asked for: it needs Ray, Optuna and torch."""
    if name == "run":
        from orchestrator.defaults import quiet_and_closed

        quiet_and_closed()  # before Ray and MLflow are imported
        from sweeps.session import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
