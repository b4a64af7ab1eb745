"""Trace records (an evaluation's MODEL.traces.jsonl, a run's samples.jsonl) -> what the page's trace browser reads.

The browser's data are scripts, `data/traces-0000.js` and on, each of which pushes some hundred traces onto
`window.TRACES`: a page opened from disk may load scripts but no JSON. Everything in them is JSON, with every `<` and
every character beyond ASCII escaped, so no text can end the script or be anything but text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrpo.errors import UserError
from mrpo.metrics import first_failure_stage
from mrpo.telemetry.jsonl import read_objects
from mrpo.telemetry.text import clean_text

CHUNK_SIZE = 400

Trace = dict[str, Any]


@dataclass(frozen=True)
class JudgedTrace:
    """What the failure figures need of one trace; None: the judge said nothing."""

    question_id: str
    correct: bool | None
    validity: tuple[bool, ...] | None


@dataclass(frozen=True)
class TraceFile:
    """A file of traces, the name of its model or run, and the data set of records that name none."""

    path: Path
    label: str
    dataset: str

    def traces(self) -> Iterator[Trace]:
        """The traces as the browser reads them, but for `images`, which are paths still.

        Raises:
            UserError: a record is no trace; with file and line.
        """
        seen: Counter[str] = Counter()
        for number, record in read_objects(self.path):
            try:
                trace = self._trace(record)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{self.path}, line {number}: not a trace of a completion: {error!r}") from None
            seen[trace["key"]] += 1
            if seen[trace["key"]] > 1:
                trace["key"] += f"~{seen[trace['key']]}"
            yield trace

    def judged(self) -> list[JudgedTrace]:
        """Every trace for the figures."""
        return [
            JudgedTrace(f"{trace['dataset']}/{trace['id']}", trace["correct"], _validity(trace))
            for trace in self.traces()
        ]

    def _trace(self, record: Mapping[str, Any]) -> Trace:
        steps = [_step(step) for step in record["steps"]]
        reward = {str(name): _number(value) for name, value in (record.get("reward") or {}).items()}
        unjudged = record.get("unjudged")
        if unjudged is None and any(step["valid"] is None for step in steps):
            unjudged = "no verdict on every step"
        trace = {
            "model": clean_text(self.label),
            "dataset": _text(record.get("dataset") or self.dataset),
            "step": _number(record.get("step")),
            "id": _text(record["id"]),
            "sample": _number(record.get("sample")),
            "question": _text(record.get("question")),
            "gold": _text(record.get("gold")),
            "rationale": _text(record.get("rationale")),
            "images": [str(image) for image in record.get("images") or ()],
            "parts": _parts(_text(record["text"]), [step["text"] for step in steps]),
            "answer": None if record.get("answer") is None else _text(record["answer"]),
            "correct": _correct(record, reward),
            "steps": steps,
            "advantage": _number(record.get("advantage")),
            "unjudged": None if unjudged is None else _text(unjudged),
            "reward": reward,
            "lexical": _number(record.get("lexical")),
            "exact": record.get("exact") if isinstance(record.get("exact"), bool) else None,
            "finish": _text(record.get("finish_reason")),
            "tokens": _number(record.get("num_tokens")),
        }
        validity = _validity(trace)
        trace["stage"] = first_failure_stage(validity) if validity else None
        places = (trace["model"], trace["step"], trace["dataset"], trace["id"], trace["sample"])
        return {"key": "|".join("" if place is None else str(place) for place in places), **trace}


def _text(value: Any) -> str:
    return "" if value is None else clean_text(str(value))


def _number(value: Any) -> float | int | None:
    """The value if it is a number that JSON has."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _bit(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": _text(step["text"]),
        "valid": _bit(step.get("valid")),
        "gold": _bit(step.get("gold_alignment")),
        "answer": _bit(step.get("answer_contribution")),
        "reason": _text(step.get("reason")),
        "advantage": _number(step.get("advantage")),
    }


def _validity(trace: Trace) -> tuple[bool, ...] | None:
    """The verdict on each step; None without it. A trace may be unjudged for its answer alone."""
    bits = tuple(step["valid"] for step in trace["steps"])
    unknown = None in bits or (not bits and trace["unjudged"] is not None)
    return None if unknown else bits


def _correct(record: Mapping[str, Any], reward: Mapping[str, Any]) -> bool | None:
    """The record's own word, or that of its answer reward: 1 is what an accepted answer gets."""
    if "correct" in record:
        return _bit(record["correct"])
    return None if reward.get("answer") is None else reward["answer"] >= 1.0


def _parts(text: str, steps: Sequence[str]) -> list[str | int]:
    """The completion cut at its steps: what stands between them as text, each step as its index.

    A step whose words are not in the text as they stand is left out; the text is there in any case.
    """
    parts: list[str | int] = []
    position = 0
    for index, step in enumerate(steps):
        found = text.find(step, position) if step else -1
        if found >= 0:
            parts += [text[position:found], index] if found > position else [index]
            position = found + len(step)
    return [*parts, text[position:]] if position < len(text) else parts


def write_chunks(
    files: Sequence[TraceFile], data_dir: Path, images_of: Callable[[TraceFile, Sequence[str]], list[dict[str, Any]]]
) -> tuple[int, int]:
    """Write every trace to scripts in `data_dir`; the number of scripts and of traces.

    Args:
        images_of: from a trace's image paths to what the browser shows of them.
    """
    chunks = total = 0
    for chunk in _chunked(_all_traces(files, images_of)):
        lines = ",\n".join(_script_json(trace) for trace in chunk)
        (data_dir / f"traces-{chunks:04d}.js").write_text(f"window.TRACES.push(\n{lines}\n);\n", encoding="ascii")
        chunks, total = chunks + 1, total + len(chunk)
    return chunks, total


def _all_traces(
    files: Sequence[TraceFile], images_of: Callable[[TraceFile, Sequence[str]], list[dict[str, Any]]]
) -> Iterator[Trace]:
    for file in files:
        for trace in file.traces():
            yield {**trace, "images": images_of(file, trace["images"])}


def _chunked(traces: Iterator[Trace]) -> Iterator[list[Trace]]:
    chunk: list[Trace] = []
    for trace in traces:
        chunk.append(trace)
        if len(chunk) == CHUNK_SIZE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _script_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
