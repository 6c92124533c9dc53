"""Errors, told apart by who can mend them, and how they show a value."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

#: A name and password in an address; a value that is called a secret.
_SECRET = re.compile(
    r"(://)(?!/)[^\s'\"/:]*:[^\s'\"]*@|((?:password|token|secret)\s*[=:]\s*)[^\s&;,]+",
    re.IGNORECASE,
)


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return an error's text, or its type if it has none, on one line without secrets."""
    return " ".join(redacted(str(error)).split())[:limit] or type(error).__name__


def redacted(text: str) -> str:
    """Return a text without what looks like a name and password in an address, or a secret."""
    return _SECRET.sub(lambda found: f"{found[1] or found[2]}***{'@' if found[1] else ''}", text)


def shown(value: Any) -> str:
    """Return a value as an error shows it: short, on one line."""
    text = repr(value)
    if isinstance(value, str) and re.fullmatch(r"[-+.\w]+", value):
        text = value
    return text if len(text) <= 60 else text[:57] + "..."


def plain(text: str) -> str:
    """Return a text that no terminal takes for a command: one line, without secrets."""
    line = redacted(text.replace("\n", " "))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def near(word: str, known: Iterable[str]) -> str:
    """Return a question that names the word meant, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: value, rule, remedy."""

    def __init__(self, message: str) -> None:
        """Take a message; whatever it quotes, it is one line that no terminal obeys."""
        super().__init__(plain(message))


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


class DiskFault(BankError, RunFailed):
    """A disk is full or broken; what was stored before is safe."""


class DeterminismFault(RunFailed):
    """The same task gave different masks in two trainings; the results can't be trusted."""


class NonFiniteLoss(RuntimeError):
    """Training diverged: the loss of a task became NaN or infinite."""
