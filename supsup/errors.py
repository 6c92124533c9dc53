"""Errors, told apart by who can mend them."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return an error's text, or its type if it has none, on one line of limited length."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: value, rule, remedy."""


class ConfigError(UserError):
    """A configuration value breaks its rule."""


class DataError(UserError):
    """A data set is missing, unreadable or not what it should be."""


class BankError(UserError):
    """A mask bank is missing, damaged, locked, or belongs to another configuration."""


class SlowPath(UserWarning):
    """Something is missing that makes the work faster; the results are the same."""


class RunFailed(RuntimeError):
    """The run can't go on, and no setting of the user is to blame. The message is one line."""


class DeterminismFault(RunFailed):
    """The same task gave different masks in two trainings; the results can't be trusted."""


class NonFiniteLoss(RuntimeError):
    """Training diverged: the loss of a task became NaN or infinite."""
