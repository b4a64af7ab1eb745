"""The one object a trainer tells what happens; it passes the news to files, dashboards and the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType

from mrpo.config import LogConfig
from mrpo.telemetry.display import Clock, Display, LiveDisplay, NoDisplay, PlainDisplay
from mrpo.telemetry.jsonl import JsonLines
from mrpo.telemetry.sinks import Sink, TensorBoardSink, WandbSink, require_packages


class Stage:
    """Work outside the training steps whose progress is shown."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def advance(self, count: int = 1) -> None:
        """`count` more items are done."""
        self._display.advance_stage(count)


class RunLog:
    """The log of a run, used as a context manager; on ranks where `is_main` is false it does nothing.

    Writes OUTPUT_DIR/metrics.jsonl and samples.jsonl, TensorBoard and Weights & Biases as `config` says, and shows a
    live panel on a terminal or one line per step elsewhere. With `resume_step` = S the files keep their records up to
    step S; with None they begin anew.

    Args:
        total_steps: global steps of the whole run, for the remaining time.
        title: heading of the live panel.
        console, clock: where to print and what tells seconds; default stdout and `time.monotonic`.

    Raises:
        UserError: a package for `log.tensorboard` or `log.wandb` is missing, or a file to resume is broken.
    """

    def __init__(
        self,
        output_dir: Path,
        config: LogConfig,
        *,
        total_steps: int,
        is_main: bool = True,
        resume_step: int | None = None,
        title: str = "mrpo",
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._sinks: list[Sink] = []
        self._samples: JsonLines | None = None
        self._display: Display = NoDisplay()
        if not is_main:
            return
        require_packages(config)
        try:
            self._sinks.append(JsonLines(output_dir / "metrics.jsonl", resume_step=resume_step))
            self._samples = JsonLines(output_dir / "samples.jsonl", resume_step=resume_step)
            if config.tensorboard:
                self._sinks.append(TensorBoardSink(output_dir, resume_step=resume_step))
            if config.wandb:
                self._sinks.append(WandbSink(output_dir, config, resume_step=resume_step))
            self._display = _make_display(console or stdout_console(), clock, total_steps, resume_step or 0, title)
        except BaseException:
            self.close()
            raise

    def log_step(self, global_step: int, metrics: Mapping[str, float]) -> None:
        """Record the scalars of one optimizer step. NaN means undefined and is written as null."""
        scalars = {name: float(metrics[name]) for name in sorted(metrics)}
        for sink in self._sinks:
            sink.write(global_step, scalars)
        self._display.step(global_step, scalars)

    def log_samples(self, global_step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append completions with their judged steps to samples.jsonl, one JSON object each."""
        if self._samples is not None:
            for sample in samples:
                self._samples.write(global_step, sample)

    def message(self, content: str | RenderableType) -> None:
        """Print above the live panel. A str is shown as it is, without markup and terminal escapes."""
        self._display.message(content)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show `name` with a progress of `total` items while the block runs; its time does not count as a step's."""
        self._display.begin_stage(name, total)
        try:
            yield Stage(self._display)
        finally:
            self._display.end_stage()

    def close(self) -> None:
        """Flush and close everything and give the terminal back. More than one call does no harm."""
        self._display.close()
        for sink in self._sinks:
            sink.close()
        if self._samples is not None:
            self._samples.close()
        self._sinks, self._samples, self._display = [], None, NoDisplay()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def stdout_console() -> Console:
    """A console on stdout: colours and cursor movement on a terminal alone, and no character that can stop a run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return _console(sys.stdout.isatty(), stderr=False)


def stderr_console() -> Console:
    """The same on stderr, for a command whose stdout is its result."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(is_terminal: bool, *, stderr: bool) -> Console:
    # Said outright, as rich takes a pipe for a terminal when FORCE_COLOR is set, as it is on many CI machines.
    return Console(stderr=stderr, force_terminal=is_terminal, highlight=False, width=None if is_terminal else 120)


def can_animate(console: Console) -> bool:
    """Whether somebody can watch a panel or a bar change in place."""
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


def _make_display(console: Console, clock: Clock, total_steps: int, first_step: int, title: str) -> Display:
    if can_animate(console):
        return LiveDisplay(console, clock, total_steps=total_steps, first_step=first_step, title=title)
    return PlainDisplay(console, clock, total_steps=total_steps, first_step=first_step)
