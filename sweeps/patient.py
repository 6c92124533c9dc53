"""A study in a database that may be away for a while: what asks it waits, and asks again.

A call is one transaction, so one that fails has changed nothing, or all of it and its answer is
lost: what is asked again then finds it done, or leaves a trial that nobody holds, which is taken up
as those of dead drivers are (sweeps.study).
"""

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from sqlalchemy.exc import InterfaceError, OperationalError

from supsup.errors import RunFailed, one_line

#: Seconds in which a database must be back, and between two tries.
_PATIENCE, _PAUSE = 600.0, 2.0
#: What Optuna asks of a database, from outside and from its cache.
_CALLS = (
    "create_new_study", "create_new_trial", "delete_study", "get_all_studies", "get_all_trials",
    "get_best_trial", "get_n_trials", "get_study_directions", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_system_attrs", "get_study_user_attrs", "get_trial",
    "get_trial_id_from_study_id_trial_number", "get_trial_number_from_id", "get_trial_param",
    "get_trial_params", "get_trial_system_attrs", "get_trial_user_attrs",
    "set_study_system_attr", "set_study_user_attr", "set_trial_intermediate_value",
    "set_trial_param", "set_trial_state_values", "set_trial_system_attr", "set_trial_user_attr",
    "_create_new_trial", "_get_trials",
)  # fmt: skip


class StorageAway(RunFailed):
    """The study's database has been away for too long; what is finished is safe."""


def is_away(error: BaseException) -> bool:
    """Say whether an error means that the database is away, not that it was asked wrongly."""
    if isinstance(error, StorageInternalError):
        return isinstance(error.__cause__, (OperationalError, InterfaceError))
    # Optuna itself stumbles over a session that broke.
    return isinstance(error, (OperationalError, InterfaceError, UnboundLocalError))


class PatientStorage(RDBStorage):
    """Optuna's database storage; every call is made again until the database is back."""

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any],
        seconds: float = _PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the database, which must be there now.

        Args:
            url: its address.
            engine_kwargs: SQLAlchemy's.
            seconds: in which it must be back.
            sleep: waits for seconds.
            clock: returns the time in seconds.
        """
        self._patience, self._sleep, self._clock = seconds, sleep, clock
        self._away_since: float | None = None
        super().__init__(url, engine_kwargs=engine_kwargs)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return functools.partial(self._patiently, found) if name in _CALLS else found

    def _patiently(self, call: Callable[..., Any], *args: Any, **names: Any) -> Any:
        again = False
        while True:
            try:
                result = call(*args, **names)
            except UpdateFinishedTrialError:
                if not again:
                    raise
                result = True  # It was done, and the answer got lost.
            except Exception as error:
                if not is_away(error):
                    raise
                self._wait(error)
                again = True
                continue
            self._away_since = None
            return result

    def _wait(self, error: Exception) -> None:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            warnings.warn(
                f"the study's database is away ({one_line(error.__cause__ or error)}); waiting "
                f"for it, at most {self._patience / 60:.0f} minutes",
                stacklevel=2,
            )
        elif now - self._away_since > self._patience:
            raise StorageAway(
                f"the study's database is away for {now - self._away_since:.0f} s "
                f"({one_line(error.__cause__ or error)}); what is finished is safe, go on with "
                "supsup sweep resume once it is back"
            ) from error
        self.remove_session()
        self._sleep(_PAUSE)
