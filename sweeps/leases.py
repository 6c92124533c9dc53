"""Who runs a trial of a shared study, and whether they still live.

A driver leaves its lease on the trials that it runs, and signs as long as it works. A trial whose
driver is gone is an orphan: who claims it goes on with it.
"""

import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

#: Seconds without a sign of a driver on another host, after which its trials are adopted.
_SILENT_SECONDS = 3600.0
#: Seconds between two signs of this driver.
_SIGN_SECONDS = 30.0
#: Seconds in which a driver that took a trial writes its lease.
_LEASE_SECONDS = 60.0
#: Seconds from a claim until it counts: others that saw the same orphan have claimed it by then.
_CLAIM_SECONDS = 1.0


class Leases:
    """This driver's signs, and its leases on trials; a study that isn't shared needs none."""

    def __init__(self, study: optuna.Study, shared: bool) -> None:
        """Begin with no trial.

        Args:
            study: the study.
            shared: whether other drivers may run trials of it now.
        """
        self._study, self._shared, self._mine = study, shared, my_lease()
        self._signed = -math.inf

    def sign(self) -> None:
        """Leave a sign of this driver, where other drivers look for it."""
        if self._shared and time.monotonic() - self._signed > _SIGN_SECONDS:
            self._signed = time.monotonic()
            self._study.set_user_attr(lease_name(self._mine), time.time())

    def take(self, trial: optuna.Trial) -> None:
        """Leave this driver's lease on a trial."""
        trial.set_user_attr("lease", self._mine)

    def holds(self, trial: optuna.Trial) -> bool:
        """Say whether a trial is still this driver's, as the storage has it now."""
        return not self._shared or self._stored(trial._trial_id).user_attrs["lease"] == self._mine

    def is_orphan(self, trial: FrozenTrial) -> bool:
        """Say whether nobody runs a trial that is running."""
        if not self._shared:
            return True
        lease = trial.user_attrs.get("lease")
        if lease is None:
            began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            return time.time() - began > _LEASE_SECONDS
        sign = self._study.user_attrs.get(lease_name(lease), 0.0)
        return not is_alive(lease, self._mine, sign, time.time())

    def claim(self, orphan: FrozenTrial) -> bool:
        """Claim an orphan, and say whether it is this driver's to take.

        The last claim counts; one that comes too late finds another lease than the orphan's.
        """
        if not self._shared:
            return True
        claim = uuid.uuid4().hex
        try:
            self._study._storage.set_trial_user_attr(orphan._trial_id, "claim", claim)
        except UpdateFinishedTrialError:
            return False
        time.sleep(_CLAIM_SECONDS)
        found = self._stored(orphan._trial_id)
        return (
            found.state == TrialState.RUNNING
            and found.user_attrs["claim"] == claim
            and found.user_attrs.get("lease") == orphan.user_attrs.get("lease")
        )

    def _stored(self, trial_id: int) -> FrozenTrial:
        return self._study._storage.get_trial(trial_id)


def my_lease() -> dict[str, Any]:
    """Return what says who runs a trial: a process, and one of the drivers that it may have."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "began": _process_start(os.getpid()),
        "driver": uuid.uuid4().hex,
    }


def is_alive(
    lease: Mapping[str, Any], mine: Mapping[str, Any], last_sign: float, now: float
) -> bool:
    """Say whether a driver still runs: by its process here, by its signs elsewhere.

    Another driver of this very process is an earlier one, such as a notebook's that was stopped.
    """
    if lease.get("host") != mine["host"]:
        return now - last_sign < _SILENT_SECONDS
    if lease["pid"] == mine["pid"]:
        return bool(lease.get("driver") == mine["driver"])
    return _process_start(int(lease["pid"])) == str(lease["began"])


def _process_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def lease_name(lease: Mapping[str, Any]) -> str:
    """Return under which name a driver leaves its signs."""
    return f"driver {lease['host']} {lease['pid']} {lease['began']} {lease.get('driver', '')}"
