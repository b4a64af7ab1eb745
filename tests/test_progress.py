"""The progress of long work where nobody can watch a bar."""

from __future__ import annotations

import io

from rich.console import Console

from mrpo.telemetry import show_progress


def test_plain_lines_tell_the_begin_every_ten_seconds_and_the_end() -> None:
    now = 0.0
    console = Console(file=io.StringIO(), width=80)
    with show_progress("answering", 9, done=2, console=console, clock=lambda: now) as progress:
        now = 4.0
        progress(3)
        now = 11.0
        progress(4)
        now = 70.0
    assert console.file.getvalue().splitlines() == ["answering  2/9", "answering  9/9", "answering  9/9  in 1:10"]


def test_a_bar_on_a_terminal_ends_full() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with show_progress("[red]answering", 5, done=1, console=console) as progress:
        progress(4)
    assert "5/5" in console.file.getvalue()
    assert "[red]answering" in console.file.getvalue()
