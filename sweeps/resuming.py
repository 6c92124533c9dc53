"""What may change in a sweep from one command to the next."""

from collections.abc import Mapping
from typing import Any

from supsup.errors import shown
from sweeps.spec import SweepSpec, to_tree

#: What may grow from one run of a sweep to the next.
_BUDGETS = ("seeds", "search.trials", "search.hours")


def differences(old: SweepSpec, new: SweepSpec) -> list[str]:
    """Return what keeps two sweeps from sharing a study: ``key: there, here``, by key."""
    before, after = (_leaves(to_tree(spec)) for spec in (old, new))
    changed = [
        f"{key} {shown(before.get(key))} there, {shown(after.get(key))} here"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and key not in _BUDGETS
    ]
    lost = set(old.seeds) - set(new.seeds)
    return changed + ([f"seeds lacks {shown(sorted(lost))}"] if lost else [])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = prefix + key
        leaves |= _leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves
