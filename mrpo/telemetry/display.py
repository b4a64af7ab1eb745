"""What the terminal shows of a run: one live panel, or one line per step where nobody can watch a panel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mrpo.telemetry.text import clean_text, format_compact, format_duration, format_number

Clock = Callable[[], float]

_STEPS_AVERAGED = 20
_SECONDS_BETWEEN_STAGE_LINES = 10.0
_SPARK_WIDTH = 24
_SPARK_MIN_CONSOLE = 76
_SPARKS = "▁▂▃▄▅▆▇█"

Format = Callable[[float | None], str]


def _seconds(value: float | None) -> str:
    return f"{format_number(value, 1)} s"


def _thousands(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and math.isfinite(value) else format_number(value)


# (label, metric, format) of the panel's two halves: how well it learns, with a trend, and how fast.
_QUALITY: tuple[tuple[str, str, Format], ...] = (
    ("reward", "reward", format_number),
    ("  answer", "reward/answer", format_number),
    ("  process", "reward/process", format_number),
    ("  length", "reward/length", format_number),
    ("early failures", "failures/early", format_number),
    ("accuracy", "answer/correct", format_number),
    ("loss", "loss", format_compact),
    ("grad norm", "grad_norm", format_compact),
)
_SPEED: tuple[tuple[str, str, Format], ...] = (
    ("tokens/s", "tokens_per_s", _thousands),
    ("rollout", "time/rollout", _seconds),
    ("judge wait", "time/judge_wait", _seconds),
    ("update", "time/update", _seconds),
    ("step", "time/step", _seconds),
    ("KL", "kl", format_compact),
    ("learning rate", "lr", format_compact),
    ("memory GiB", "memory_gib", format_compact),
)
# What a plain line calls the longest stages of a step.
_PHASES = {"rollout": "rollout", "judge": "judge_wait", "update": "update"}


class Pace:
    """Elapsed and remaining time; what runs between training steps (evaluation) is not counted as one."""

    def __init__(self, clock: Clock, *, total_steps: int, first_step: int) -> None:
        self.global_step = first_step
        self.total_steps = total_steps
        self._clock = clock
        self._start = self._mark = clock()
        self._durations: list[float] = []

    def step(self, global_step: int, seconds: float | None) -> None:
        """Count up to `global_step`; each step took `seconds`, or its share of the time since the last call."""
        now = self._clock()
        measured = (now - self._mark) / max(1, global_step - self.global_step)
        self._durations = [*self._durations, measured if seconds is None else seconds][-_STEPS_AVERAGED:]
        self.global_step, self._mark = global_step, now

    def restart(self) -> None:
        """The next step begins now."""
        self._mark = self._clock()

    def elapsed(self) -> float:
        return self._clock() - self._start

    def remaining(self) -> float | None:
        """Seconds to the last step, from the mean of recent steps; None before the first."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        left = self.total_steps - self.global_step
        return max(0.0, mean * left - min(mean, self._clock() - self._mark))


class Display(Protocol):
    """What shows a run to a person."""

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, content: str | RenderableType) -> None: ...

    def begin_stage(self, name: str, total: int | None) -> None: ...

    def advance_stage(self, count: int) -> None: ...

    def end_stage(self) -> None: ...

    def close(self) -> None: ...


class NoDisplay:
    """Shows nothing: the ranks beside the first."""

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, content: str | RenderableType) -> None:
        pass

    def begin_stage(self, name: str, total: int | None) -> None:
        pass

    def advance_stage(self, count: int) -> None:
        pass

    def end_stage(self) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay:
    """One line per step and a few per stage, for logs and pipes."""

    def __init__(self, console: Console, clock: Clock, *, total_steps: int, first_step: int) -> None:
        self._console = console
        self._clock = clock
        self._pace = Pace(clock, total_steps=total_steps, first_step=first_step)
        self._stage: _Stage | None = None
        self._last_stage_line = 0.0

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        self._pace.step(global_step, metrics.get("time/step"))
        self.message(step_line(global_step, self._pace.total_steps, metrics, self._pace.remaining()))

    def message(self, content: str | RenderableType) -> None:
        _print(self._console, content)

    def begin_stage(self, name: str, total: int | None, done: int = 0) -> None:
        self._stage = _Stage(name, total, self._clock(), done)
        self._last_stage_line = self._clock()
        self.message(name if total is None else f"{name}  {done}/{total}")

    def advance_stage(self, count: int) -> None:
        if self._stage is None:
            return
        self._stage.done += count
        if self._clock() - self._last_stage_line >= _SECONDS_BETWEEN_STAGE_LINES:
            self._last_stage_line = self._clock()
            self.message(f"{self._stage.name}  {self._stage.count()}")

    def end_stage(self) -> None:
        if self._stage is not None:
            seconds = format_duration(self._clock() - self._stage.start)
            self.message(f"{self._stage.name}  {self._stage.count()}  in {seconds}")
        self._stage = None
        self._pace.restart()

    def close(self) -> None:
        pass


class LiveDisplay:
    """One panel that stays at the bottom of the terminal, with messages above it."""

    def __init__(self, console: Console, clock: Clock, *, total_steps: int, first_step: int, title: str) -> None:
        self._console = console
        self._clock = clock
        self._title = clean_text(title)
        self._pace = Pace(clock, total_steps=total_steps, first_step=first_step)
        self._stage: _Stage | None = None
        self._history: dict[str, list[float]] = {}
        self._metrics = Table.grid()
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._panel)
        self._live.start()

    def step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        self._pace.step(global_step, metrics.get("time/step"))
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        # Built here and not by the refreshing thread: it changes once a step, the clocks twice a second.
        self._metrics = metrics_table(self._history, trend=self._console.width >= _SPARK_MIN_CONSOLE)
        self._live.refresh()

    def message(self, content: str | RenderableType) -> None:
        _print(self._console, content)

    def begin_stage(self, name: str, total: int | None) -> None:
        self._stage = _Stage(clean_text(name), total, self._clock())
        self._live.refresh()

    def advance_stage(self, count: int) -> None:
        if self._stage is not None:
            self._stage.done += count

    def end_stage(self) -> None:
        self._stage = None
        self._pace.restart()
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _panel(self) -> RenderableType:
        pace, stage = self._pace, self._stage
        remaining = pace.remaining()
        times = f"{format_duration(pace.elapsed())} elapsed"
        if remaining is not None:
            times += f", {format_duration(remaining)} left"
        bars = Table.grid(expand=True, padding=(0, 1, 0, 0))
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(no_wrap=True, justify="right")
        bars.add_row(
            Text(f"step {pace.global_step}/{pace.total_steps}", style="bold"),
            ProgressBar(total=max(1, pace.total_steps), completed=pace.global_step),
            Text(times, style="cyan"),
        )
        if stage is not None:
            progress = ProgressBar(total=stage.total, completed=stage.done, pulse=stage.total is None)
            since = format_duration(self._clock() - stage.start)
            bars.add_row(Text(stage.name), progress, Text(f"{stage.count()}  {since}".strip(), style="cyan"))
        content = Group(bars, Text(), self._metrics) if self._history else bars
        return Panel(content, title=Text(self._title, style="bold"), title_align="left", border_style="dim")


class _Stage:
    def __init__(self, name: str, total: int | None, start: float, done: int = 0) -> None:
        self.name, self.total, self.start, self.done = name, total, start, done

    def count(self) -> str:
        if self.total is None:
            return str(self.done) if self.done else ""
        return f"{self.done}/{self.total}"


def step_line(global_step: int, total_steps: int, metrics: Mapping[str, float], remaining: float | None) -> str:
    """A step as one line of text, with the metrics that there are. `remaining` is in seconds."""
    parts = [f"step {global_step}/{total_steps}"]
    if "reward" in metrics:
        names = [name for name in ("answer", "process", "length") if f"reward/{name}" in metrics]
        rewards = " ".join(f"{name} {format_number(metrics[f'reward/{name}'])}" for name in names)
        parts.append(f"reward {format_number(metrics['reward'])}" + (f" ({rewards})" if rewards else ""))
    else:
        optimizer = (("loss", "loss"), ("grad norm", "grad_norm"), ("lr", "lr"))
        parts += [f"{label} {format_compact(metrics[name])}" for label, name in optimizer if name in metrics]
    if "failures/early" in metrics:
        parts.append(f"early {format_number(metrics['failures/early'])}")
    if "tokens_per_s" in metrics:
        parts.append(f"{_thousands(metrics['tokens_per_s'])} tok/s")
    phases = {name: f"time/{key}" for name, key in _PHASES.items() if f"time/{key}" in metrics}
    if phases:
        parts.append(" ".join(f"{name} {_seconds(metrics[key])}" for name, key in phases.items()))
    if remaining is not None:
        parts.append(f"remaining {format_duration(remaining)}")
    return "  ".join(parts)


def metrics_table(history: Mapping[str, Sequence[float]], *, trend: bool) -> Table:
    """The latest values of the metrics that there are, with a sparkline of the whole run beside them if `trend`."""
    quality = [
        (Text(label), Text(form(history[name][-1]), style="bold"), Text(sparkline(history[name]) if trend else ""))
        for label, name, form in _QUALITY
        if name in history
    ]
    speed = [(Text(label), Text(form(history[name][-1]))) for label, name, form in _SPEED if name in history]
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "left", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.columns[2].style = "blue"
    table.columns[3].style = table.columns[4].style = "dim"
    for row in range(max(len(quality), len(speed))):
        left = quality[row] if row < len(quality) else ("", "", "")
        right = speed[row] if row < len(speed) else ("", "")
        table.add_row(*left, *right)
    return table


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """`values` as at most `width` block characters, from their least to their greatest; undefined ones are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    bins = min(width, len(finite))
    edges = [len(finite) * index // bins for index in range(bins + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 1e-9 * max(abs(low), 1e-9):
        return _SPARKS[3] * bins
    return "".join(_SPARKS[round((mean - low) / span * (len(_SPARKS) - 1))] for mean in means)


def _print(console: Console, content: str | RenderableType) -> None:
    # A str becomes Text so that neither markup such as [red] nor emoji codes in it are interpreted.
    if isinstance(content, str):
        content = Text(clean_text(content))
    # In a log a line of text stays one line, however long; tables need the console's width either way.
    console.print(content, soft_wrap=isinstance(content, Text) and not console.is_terminal)
