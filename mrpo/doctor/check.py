"""What a check says: a name, a state, a fact, and for what is not right the command that mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from mrpo.errors import UserError

T = TypeVar("T")
State = Literal["ok", "optional", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """One finding about the machine or the configuration.

    `state`: ok; optional: not there, and this configuration does not use it; warning: it runs, but not as one may
    expect; missing: this configuration cannot run without it. `details` are lines of arithmetic behind the fact.
    """

    name: str
    state: State
    fact: str
    remedy: str | None = None
    details: tuple[str, ...] = ()


def guarded(name: str, check: Callable[[], Check], remedy: str | None = None) -> Check:
    """The result of `check`, or that it failed: one broken thing must not hide what the other checks say."""
    result, problem = attempt(name, check, remedy)
    return problem or cast(Check, result)


def attempt(name: str, read: Callable[[], T], remedy: str | None = None) -> tuple[T | None, Check | None]:
    """What `read` returns, or the check that says why it could not."""
    try:
        return read(), None
    except UserError as error:
        return None, Check(name, "missing", str(error), remedy)
    except Exception as error:
        return None, Check(name, "missing", f"{type(error).__name__}: {first_line(error)}", remedy)


def first_line(error: Exception) -> str:
    """The first line of what `error` says, at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), "")[:200]


def gib(size: float) -> str:
    """A number of bytes in GiB, or in MiB where that would read as nothing."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.0f} MiB"
