"""What tells the baselines apart: what each task has of its own, and when the trunk is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from supsup.config import RunConfig
from supsup.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a baseline learns."""

    own: Literal["factors", "head", "network", "nothing", "units"]
    """What a task has of its own: rank-one factors, the last layer, everything, nothing, a mask of
    hidden units."""
    trunk: Literal["first", "always", "never"]
    """When the weights that tasks share are trained: on task 1, on every task, never (random)."""
    rotated: bool = False
    """Whether every layer sees its inputs turned by a random rotation of the task's own."""
    infers: bool = False
    """Whether it can say which task unlabelled images belong to."""

    @property
    def forgets(self) -> bool:
        """Whether a task changes what those before it need."""
        return self.trunk == "always"

    def needs(self, task: int) -> int | None:
        """Return the task that must be learned before this one, if any."""
        if task == 0 or self.trunk == "never":
            return None
        return task - 1 if self.trunk == "always" else 0

    def trains_trunk(self, task: int) -> bool:
        """Say whether a task trains the shared weights."""
        return self.trunk == "always" or (self.trunk == "first" and task == 0)


RULES: Mapping[str, Rule] = {
    # BatchE (Wen et al. 2020): W ⊙ r sᵀ, W of task 1 or random.
    "batche": Rule(own="factors", trunk="first", infers=True),
    "batche-random": Rule(own="factors", trunk="never", infers=True),
    # Parameter superposition by rotations (Cheung et al. 2019).
    "psp": Rule(own="nothing", trunk="always", rotated=True),
    "heads": Rule(own="head", trunk="first"),
    "heads-random": Rule(own="head", trunk="never"),
    "upper-bound": Rule(own="network", trunk="never"),
    "lower-bound": Rule(own="nothing", trunk="always"),
}
#: Task inference by what a superposition of rank-one weights allows.
METHODS = (
    "h-one-shot", "h-shortlist", "h-binary", "h-gradient-descent", "h-all-masks",
    "g-one-shot", "g-shortlist", "g-binary", "g-gradient-descent", "max-logit",
)  # fmt: skip


def check_baseline(config: RunConfig) -> None:
    """Check that a baseline can be run in the scenario, and evaluated by the methods.

    Raises:
        ConfigError: if it can't infer tasks that are not given, or not by that method.
    """
    learner, scenario = config.learner, config.scenario
    if scenario == "nns":
        raise ConfigError(f"scenario is nns, which learner {learner} isn't made for; choose gg")
    if config.mask.transfer != "none":
        raise ConfigError(
            f"mask.transfer is {config.mask.transfer}, but learner {learner} has no masks; set it "
            "to none"
        )
    if scenario == "gg":
        return
    if not RULES[learner].infers:
        able = ", ".join(name for name, rule in RULES.items() if rule.infers)
        raise ConfigError(
            f"scenario is {scenario}, but learner {learner} can't infer tasks; set it to gg, or "
            f"choose supsup, hopsupsup, {able}"
        )
    for method in config.eval.methods:
        if method not in METHODS:
            raise ConfigError(
                f"eval.methods has {method}, but learner {learner} infers tasks by "
                f"{', '.join(METHODS)}"
            )
