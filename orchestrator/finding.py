"""What a check found: a line with a value and, where something is amiss, a remedy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: how it is, what was looked at, what was found, and how to mend it."""

    level: Level
    what: str
    value: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """What was found, and its remedy."""
        return f"{self.value}; {self.remedy}" if self.remedy else self.value


def works(findings: Iterable[Finding]) -> bool:
    """Say whether a run would work, as far as these findings tell."""
    return all(finding.level != "fail" for finding in findings)
