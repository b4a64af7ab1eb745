from __future__ import annotations

import io

from rich.console import Console

from mrpo.report.sample import render_sample

SAMPLE = {
    "step": 80,
    "question": "What is in the [bold]liver[/bold]?",
    "gold": "a cyst",
    "answer": "[/red] a cyst\x1b[2J",
    "text": "<think>raw</think>",
    "steps": [
        {"text": "The liver is\nseen.", "valid": True, "reason": ""},
        {"text": "It is [red]bright[/red].", "valid": False, "reason": "it is \x1b[31mdark", "advantage": -1.5},
        {"text": "So a cyst.", "valid": None, "reason": ""},
    ],
    "reward": {"answer": 1.0, "process": None, "length": -0.25},
}


def render(sample, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=100, **options).print(render_sample(sample))
    return out.getvalue()


def test_plain_text_shows_everything_as_written():
    assert render(SAMPLE, force_terminal=False).rstrip("\n").split("\n") == [
        "question  What is in the [bold]liver[/bold]?",
        "gold      a cyst",
        "answer    [/red] a cyst",
        "reward    answer 1.00, process –, length -.25",  # noqa: RUF001
        "sampled   at global step 80",
        "  ✓  1  The liver is seen.",
        "  ✗  2  It is [red]bright[/red].  -1.50  (it is dark)",
        "  ?  3  So a cyst.",
    ]


def test_colours_on_a_terminal():
    first, second, third = render(SAMPLE, force_terminal=True, color_system="standard").split("\n")[5:8]
    assert "\x1b[32mThe liver" in first
    assert "\x1b[31mIt is [red]bright" in second
    assert "\x1b[33mSo a cyst" in third


def test_completion_without_steps_or_verdict():
    sample = {"question": "q", "gold": "g", "answer": None, "text": "no\x07 tags", "steps": [], "unjudged": "timed out"}
    assert render(sample, force_terminal=False).rstrip("\n").split("\n") == [
        "question  q",
        "gold      g",
        "answer    –",  # noqa: RUF001
        "no steps  no tags",
        "unjudged  timed out",
    ]
