from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_folders import trace, write_lines

from mrpo.errors import UserError
from mrpo.report.page.traces import CHUNK_SIZE, TraceFile, _parts, write_chunks


def traces_of(folder: Path, records: list[dict[str, Any]], **fields: str) -> list[dict[str, Any]]:
    write_lines(folder / "m.traces.jsonl", records)
    return list(TraceFile(folder / "m.traces.jsonl", fields.get("label", "m"), fields.get("dataset", "")).traces())


def read_chunks(data: Path) -> list[dict[str, Any]]:
    """What the scripts push, by an independent reading of their text."""
    read = []
    for file in sorted(data.glob("*.js")):
        text = file.read_text(encoding="ascii")
        assert text.startswith("window.TRACES.push(")
        read += json.loads(f"[{text.removeprefix('window.TRACES.push(').removesuffix(');' + chr(10))}]")
    return read


def test_a_trace_is_cut_at_its_steps(tmp_path: Path) -> None:
    (read,) = traces_of(tmp_path, [trace(7, (True, False))])
    assert read["parts"] == ["<think>", 0, " ", 1, "</think><answer>yes 7</answer>"]
    assert (read["stage"], read["correct"], read["unjudged"]) == ("late", True, None)
    assert (read["dataset"], read["model"], read["finish"], read["tokens"]) == ("toy", "m", "stop", 12)


@given(st.text(max_size=40), st.lists(st.text(max_size=6), max_size=6))
def test_parts_are_the_whole_text_in_order(text: str, steps: list[str]) -> None:
    parts = _parts(text, steps)
    assert "".join(steps[part] if isinstance(part, int) else part for part in parts) == text
    found = [part for part in parts if isinstance(part, int)]
    assert found == sorted(set(found))
    assert "" not in parts


def test_a_training_sample_lacks_what_evaluations_have(tmp_path: Path) -> None:
    record = {
        "step": 3,
        "id": "a",
        "text": "x",
        "steps": [],
        "reward": {"answer": 1.0, "process": None},
        "answer": None,
    }
    (read,) = traces_of(tmp_path, [record], label="run", dataset="phantom")
    assert (read["step"], read["dataset"], read["correct"], read["exact"]) == (3, "phantom", True, None)
    assert (read["stage"], read["images"], read["gold"]) == (None, [], "")
    assert read["reward"] == {"answer": 1.0, "process": None}


@pytest.mark.parametrize(
    ("validity", "unjudged", "stage"),
    [
        ((False, True, True), None, "early"),
        ((True, False, True), None, "mid"),
        ((True, True), None, None),
        ((), None, None),
        ((None, None), "no verdict", None),
        ((False, True, True), "no verdict on the answer", "early"),
    ],
)
def test_stage_and_verdicts(tmp_path: Path, validity, unjudged: str | None, stage: str | None) -> None:
    record = {**trace(0, validity), "unjudged": unjudged}
    (read,) = traces_of(tmp_path, [record])
    assert (read["stage"], read["unjudged"]) == (stage, unjudged)
    (judged,) = TraceFile(tmp_path / "m.traces.jsonl", "m", "").judged()
    assert judged.validity == (None if None in validity else validity)


def test_a_step_without_verdict_makes_a_trace_unjudged(tmp_path: Path) -> None:
    (read,) = traces_of(tmp_path, [{**trace(0, (True, None)), "unjudged": None}])
    assert read["unjudged"]
    assert read["stage"] is None


def test_undefined_numbers_become_null(tmp_path: Path) -> None:
    record = trace(0, reward={"answer": float("nan"), "process": float("inf")}, lexical=float("-inf"), num_tokens=True)
    (read,) = traces_of(tmp_path, [record])
    assert read["reward"] == {"answer": None, "process": None}
    assert read["lexical"] is read["tokens"] is None


def test_keys_are_stable_and_differ(tmp_path: Path) -> None:
    records = [trace(0), trace(0), trace(0, sample=1)]
    keys = [read["key"] for read in traces_of(tmp_path, records)]
    assert len(set(keys)) == 3
    assert keys == [read["key"] for read in traces_of(tmp_path, records)]


@pytest.mark.parametrize("record", [{}, {"id": "a"}, {"id": "a", "text": "", "steps": ["x"]}, {"id": 1, "steps": 5}])
def test_what_is_no_trace_is_named_with_its_line(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"m\.traces\.jsonl, line 2"):
        traces_of(tmp_path, [trace(0), record])


def test_chunks_hold_every_trace_once_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "m.jsonl", [trace(n) for n in range(2 * CHUNK_SIZE + 1)])
    file = TraceFile(tmp_path / "m.jsonl", "m", "")
    (tmp_path / "data").mkdir()
    assert write_chunks([file], tmp_path / "data", lambda file, images: []) == (3, 2 * CHUNK_SIZE + 1)
    assert [read["id"] for read in read_chunks(tmp_path / "data")] == [f"q{n}" for n in range(2 * CHUNK_SIZE + 1)]


@pytest.mark.parametrize(
    "text",
    ["</script><script>alert(1)</script>", "<!-- <script>", "\u2028\u2029", "ü 医 🫀", "a\\b\"c'd`${e}", "\ud800"],
)
def test_no_text_can_leave_its_script(tmp_path: Path, text: str) -> None:
    write_lines(tmp_path / "m.jsonl", [trace(0, question=text)])
    (tmp_path / "data").mkdir()
    write_chunks([TraceFile(tmp_path / "m.jsonl", "m", "")], tmp_path / "data", lambda file, images: [])
    script = (tmp_path / "data" / "traces-0000.js").read_bytes()
    assert b"<" not in script
    assert script.isascii()
    assert read_chunks(tmp_path / "data")[0]["question"] == text.replace("\ud800", "\ufffd")
