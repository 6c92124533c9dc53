"""The study of a sweep: which trials there are and what became of them, in Optuna's storage.

One driver process asks and tells. The embedded storage is a journal file in the sweep's folder,
held by one driver at a time; a database may be shared by several, and each leaves a lease on the
trials that it runs. A trial whose driver is gone is *adopted*: it goes on under its number, so
that none is lost, none is done twice, and none stays running.
"""

import contextlib
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from supsup.errors import ConfigError
from supsup.fields import get_field
from supsup.seeding import derive_seed
from sweeps.leases import Leases
from sweeps.resuming import differences
from sweeps.spec import MAX_SEED, OBJECTIVES, SweepSpec, spec_of, to_tree

_SEED = "seed"
#: Marks a trial of a search that tries a failed one again, with the number of that one.
_AGAIN = "again"
#: Accuracies by trial: {tasks learned: {metric: value}}.
Curve = dict[int, dict[str, float]]

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial to do."""

    number: int
    values: Mapping[str, Any]
    seed: int
    adopted: bool
    """Whether another driver began it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a trial."""

    number: int
    state: Literal["waiting", "running", "done", "pruned", "failed"]
    values: Mapping[str, Any]
    seed: int
    curve: Curve
    objectives: tuple[float, ...]
    reason: str
    fingerprint: str
    seconds: float | None


# --- policy ----------------------------------------------------------------------------------


def missing(wanted: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the trials of a grid, as parameters, that must be enqueued: new ones and failed."""
    settled = {_key(_params(record)) for record in records if record.state != "failed"}
    return [dict(params) for params in wanted if _key(params) not in settled]


def latest(records: Sequence[Record]) -> list[Record]:
    """Return the records without the failures that were tried again later."""
    newest = {_key(_params(record)): record for record in records}
    return [
        record
        for record in records
        if record.state != "failed" or newest[_key(_params(record))] is record
    ]


def _params(record: Record) -> dict[str, Any]:
    return {**record.values, _SEED: record.seed}


def _key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def distributions(spec: SweepSpec) -> dict[str, BaseDistribution]:
    """Return what a trial's parameters may be."""
    if spec.search is None:
        grid = {path: CategoricalDistribution(values) for path, values in spec.axes.items()}
        return {**grid, _SEED: IntDistribution(0, MAX_SEED - 1)}
    found: dict[str, BaseDistribution] = {}
    for path, x in spec.search.space.items():
        if x.choices is not None:
            found[path] = CategoricalDistribution(x.choices)
            continue
        low, high = x.low or 0.0, x.high or 0.0
        if isinstance(get_field(spec.first(), path), int):
            step = int(x.step or 1)
            found[path] = IntDistribution(int(low), int(high), log=x.log, step=step)
        else:
            found[path] = FloatDistribution(low, high, log=x.log, step=x.step)
    return found


def _sampler(spec: SweepSpec, trials: int) -> optuna.samplers.BaseSampler:
    """Return the sampler; resumed with the same seed, it would repeat its draws."""
    seed = derive_seed(spec.seeds[0], "sampler", trials) % 2**32
    if spec.search is None or spec.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


def _pruner(spec: SweepSpec, checkpoints: Sequence[int]) -> optuna.pruners.BasePruner:
    name = spec.search.pruner if spec.search and spec.search.pruned else "none"
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=checkpoints[0], reduction_factor=2
        )
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=checkpoints[0], max_resource=checkpoints[-1], reduction_factor=2
        )
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    return optuna.pruners.NopPruner()


# --- the study -------------------------------------------------------------------------------


class SweepStudy:
    """The trials of one sweep."""

    def __init__(
        self, spec: SweepSpec, storage: BaseStorage, checkpoints: Sequence[int], shared: bool
    ) -> None:
        """Open the study, or begin it.

        Args:
            spec: the sweep.
            storage: where the study is.
            checkpoints: numbers of tasks learned at which a trial reports.
            shared: whether other drivers may run trials of the study now.

        Raises:
            ConfigError: if the study is of another sweep; names the keys that differ.
        """
        self._spec = spec
        known = _find(spec.name, storage)
        if known is not None:
            _check_same(known, spec)
        self._study = optuna.create_study(
            study_name=spec.name,
            storage=storage,
            directions=[OBJECTIVES[name] for name in spec.objectives],  # type: ignore[misc]
            load_if_exists=True,
        )
        trials = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(spec, trials)
        self._study.pruner = _pruner(spec, checkpoints)
        if known != spec:
            self._study.set_user_attr("spec", to_tree(spec))
        if "identity" not in self._study.user_attrs:
            self._study.set_user_attr("identity", uuid.uuid4().hex)
        self.identity: str = self._study.user_attrs["identity"]
        """Names the sweep for the tracking server."""
        self._distributions = distributions(spec)
        self._live: dict[int, optuna.Trial] = {}
        self._leases = Leases(self._study, shared)

    # --- what there is -------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """Return every trial, in order."""
        return _records(self._study, self._spec)

    def enqueue(self, wanted: Sequence[Mapping[str, Any]]) -> int:
        """Enqueue the trials of a grid that are neither done nor waiting; return how many."""
        new = missing(wanted, self.records())
        for params in new:
            self._study.enqueue_trial(params)
        return len(new)

    def retry_failed(self) -> int:
        """Enqueue the failed trials of a search again; return how many. None is drawn for them."""
        failed = [record for record in latest(self.records()) if record.state == "failed"]
        for record in failed:
            self._study.enqueue_trial(dict(record.values), user_attrs={_AGAIN: record.number})
        return len(failed)

    def is_settled(self) -> bool:
        """Say whether nothing is left to do."""
        frozen = self._study.get_trials(deepcopy=False)
        return all(t.state.is_finished() for t in frozen) and not self._may_draw(frozen)

    def _may_draw(self, frozen: Sequence[FrozenTrial]) -> bool:
        drawn = sum(_AGAIN not in t.user_attrs for t in frozen)
        return self._spec.search is not None and drawn < self._spec.search.trials

    # --- work ----------------------------------------------------------------------------------

    def next(self) -> Trial | None:
        """Return the next trial to do: one left behind, one that waits, else a new draw."""
        self.sign()
        states = (TrialState.RUNNING, TrialState.WAITING)
        frozen = self._study.get_trials(deepcopy=False)
        unfinished = [t for t in frozen if t.state in states]
        for left in unfinished:
            if left.state == TrialState.RUNNING and self._is_left(left):
                return self._take(optuna.Trial(self._study, left._trial_id), adopted=True)
        waits = any(t.state == TrialState.WAITING for t in unfinished)
        if not waits and not self._may_draw(frozen):
            return None
        asked = self._study.ask()
        is_drawn = "fixed_params" not in self._frozen(asked).system_attrs
        if is_drawn and not self._may_draw(frozen):
            # Another driver took the last one that waited.
            asked.set_user_attr("surplus", True)
            self._study.tell(asked, state=TrialState.FAIL)
            return None
        return self._take(asked, adopted=False)

    def _is_left(self, trial: FrozenTrial) -> bool:
        """Say whether a running trial was left behind, and is this driver's to adopt."""
        is_own = trial.number in self._live
        return not is_own and self._leases.is_orphan(trial) and self._leases.claim(trial)

    def _take(self, trial: optuna.Trial, adopted: bool) -> Trial:
        self._leases.take(trial)
        params = {name: trial._suggest(name, d) for name, d in self._distributions.items()}
        seed = params.pop(_SEED, self._spec.seeds[0])
        self._live[trial.number] = trial
        return Trial(number=trial.number, values=params, seed=seed, adopted=adopted)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self._study._storage.get_trial(trial._trial_id)

    def sign(self) -> None:
        """Leave a sign of this driver now and then, where other drivers look for it."""
        self._leases.sign()

    def holds(self, number: int) -> bool:
        """Say whether a trial is still this driver's: one that was silent for long may lose it."""
        return self._leases.holds(self._live[number])

    def note(self, number: int, key: str, value: Any) -> None:
        """Keep something with a trial."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._live[number].set_user_attr(key, value)

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Report a trial's accuracy at a number of tasks, and say whether it is to be stopped."""
        if self._spec.search is None or not self._spec.search.pruned:
            return False
        trial = self._live[number]
        if step not in self._frozen(trial).intermediate_values:
            with contextlib.suppress(UpdateFinishedTrialError):
                trial.report(value, step)
        return bool(trial.should_prune())

    def finish(
        self,
        number: int,
        state: Literal["done", "pruned", "failed"],
        curve: Curve,
        objectives: Sequence[float] = (),
        reason: str = "",
    ) -> bool:
        """End a trial, unless another driver took it; say whether. Objectives must be finite."""
        is_held, trial = self.holds(number), self._live.pop(number)
        if not is_held:
            return False
        values = list(objectives) if state == "done" else None
        try:
            trial.set_user_attr("curve", [[k, curve[k]] for k in sorted(curve)])
            if reason:
                trial.set_user_attr("reason", reason)
            self._study.tell(trial, values, state=_ENDS[state], skip_if_finished=True)
        except UpdateFinishedTrialError:
            return False
        return True

    @property
    def optuna(self) -> optuna.Study:
        """The study itself, for Optuna's own plots."""
        return self._study


def read_records(spec: SweepSpec, storage: BaseStorage) -> list[Record]:
    """Return the trials of a sweep, none if it hasn't begun. Writes nothing.

    Raises:
        ConfigError: if the study is of another sweep; names the keys that differ.
    """
    known = _find(spec.name, storage)
    if known is None:
        return []
    _check_same(known, spec)
    return _records(optuna.load_study(study_name=spec.name, storage=storage), spec)


def _records(study: optuna.Study, spec: SweepSpec) -> list[Record]:
    trials = study.get_trials(deepcopy=False)
    return [_record(t, spec.seeds[0]) for t in trials if "surplus" not in t.user_attrs]


def _find(name: str, storage: BaseStorage) -> SweepSpec | None:
    try:
        tree = optuna.load_study(study_name=name, storage=storage).user_attrs.get("spec")
    except KeyError:
        return None
    return spec_of(tree) if tree else None


def _check_same(old: SweepSpec, new: SweepSpec) -> None:
    changed = differences(old, new)
    if changed:
        raise ConfigError(
            f"sweep {new.name} was begun with another specification ({'; '.join(changed)}); "
            "give this one another name"
        )


_STATES: Mapping[TrialState, Literal["waiting", "running", "done", "pruned", "failed"]] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_ENDS = {name: state for state, name in _STATES.items()}


def _record(trial: FrozenTrial, only_seed: int) -> Record:
    """Return what is known of a trial; those of a search have one seed, no parameter."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    attrs = trial.user_attrs
    ended = trial.datetime_complete and trial.datetime_start
    return Record(
        number=trial.number,
        state=_STATES[trial.state],
        seed=params.pop(_SEED, only_seed),
        values=params,
        curve={int(k): values for k, values in attrs.get("curve", [])},
        objectives=tuple(trial.values or ()),
        reason=attrs.get("reason", ""),
        fingerprint=attrs.get("fingerprint", ""),
        seconds=trial.duration.total_seconds() if ended and trial.duration else None,
    )


def in_turn(keys: Sequence[str]) -> Iterator[int]:
    """Yield indices so that equal keys come far apart: trials of one bank wait for each other."""
    seen: dict[str, int] = {}
    ranks = []
    for key in keys:
        ranks.append(seen.get(key, 0))
        seen[key] = ranks[-1] + 1
    yield from sorted(range(len(keys)), key=lambda i: (ranks[i], i))
