"""One completion with its judged steps, for reading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from mrpo.telemetry.text import UNDEFINED, clean_text, format_number

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}


def render_sample(sample: Mapping[str, Any]) -> Text:
    """A record of samples.jsonl as text: question, gold, answer, rewards, and each step with its verdict.

    Valid steps are marked and green, invalid ones red with the judge's reason, unjudged ones yellow; where the console
    is no terminal the marks alone remain. Model output is never interpreted as markup or terminal escapes.

    Args:
        sample: `{"step", "question", "gold", "answer", "text", "steps": [{"text", "valid", "reason", "advantage"}],
            "reward": {name: value}}`; `reason`, `advantage`, `reward` and `step` may be missing, `unjudged` may say
            why there is no verdict. The completion's text is shown only where no step was found in it.
    """
    text = Text()
    _line(text, "question", sample["question"], "bold")
    _line(text, "gold", sample["gold"], "")
    _line(text, "answer", sample["answer"], "")
    if sample.get("reward"):
        rewards = ", ".join(f"{name} {format_number(value)}" for name, value in sample["reward"].items())
        _line(text, "reward", rewards, "cyan")
    if "step" in sample:
        _line(text, "sampled", f"at global step {sample['step']}", "cyan")
    steps: Sequence[Mapping[str, Any]] = sample.get("steps", ())
    for number, step in enumerate(steps, start=1):
        _append_step(text, number, step)
    if not steps:
        _line(text, "no steps", sample["text"], "yellow")
    if sample.get("unjudged"):
        _line(text, "unjudged", sample["unjudged"], "yellow")
    return text


def _line(text: Text, label: str, value: object, style: str) -> None:
    text.append(f"{label:<9} ", style="dim")
    text.append(_one_line(UNDEFINED if value is None else str(value)) + "\n", style=style)


def _append_step(text: Text, number: int, step: Mapping[str, Any]) -> None:
    mark, style = _MARKS[step.get("valid")]
    text.append(f"  {mark} {number:>2}  ", style=f"bold {style}")
    text.append(_one_line(step["text"]), style=style)
    advantage = step.get("advantage")
    if advantage is not None and math.isfinite(advantage):
        text.append(f"  {advantage:+.2f}", style="dim")
    if step.get("reason"):
        text.append(f"  ({_one_line(step['reason'])})", style="dim italic")
    text.append("\n")


def _one_line(value: str) -> str:
    return " ".join(clean_text(value).split())
