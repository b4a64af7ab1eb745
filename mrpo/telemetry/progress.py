"""The progress of one long piece of work: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mrpo.telemetry.display import Clock, PlainDisplay
from mrpo.telemetry.run_log import can_animate, stdout_console
from mrpo.telemetry.text import clean_text


@contextmanager
def show_progress(
    name: str, total: int, *, done: int = 0, console: Console | None = None, clock: Clock = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Shows `name` while the block runs, `done` of `total` items finished before; gives a function to be told of more.

    Args:
        console, clock: where to print and what tells seconds; default stdout and `time.monotonic`.
    """
    console = console or stdout_console()
    if can_animate(console):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, expand=True) as bar:
            task = bar.add_task(clean_text(name), total=total, completed=done)
            yield lambda count: bar.advance(task, count)
    else:
        display = PlainDisplay(console, clock, total_steps=0, first_step=0)
        display.begin_stage(name, total, done)
        try:
            yield display.advance_stage
        finally:
            display.end_stage()
