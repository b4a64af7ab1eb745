from __future__ import annotations

import json
from pathlib import Path

import pytest
from assessed_items import item

from mrpo.assessment.assessed import Assessed, follows_format, trace_record
from mrpo.records import Completion, Example

GOOD = "<think>A mass is seen.</think>\n<answer>mass</answer>"


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        (GOOD, True),
        ("\n" + GOOD + "<|im_end|>", True),
        ("A mass is seen.</think><answer>mass</answer>", True),  # the template ended the prompt with the opening tag
        ("<think>p < 0.05 and a > b</think> So: <answer>x < y</answer>", True),
        ("<think>A mass.<answer>mass</answer>", False),
        ("<answer>mass</answer>", False),
        ("<think>A mass.</think>mass", False),
        ("<think>A mass.</think><answer>mass", False),
        ("<think> </think><answer>mass</answer>", False),
        ("<think>A mass.</think><answer>\n</answer>", False),
        ("Well. <think>A mass.</think><answer>mass</answer>", False),
        ("<think>A.</think><think>B.</think><answer>mass</answer>", False),
        ("<answer>mass</answer><think>A.</think><answer>mass</answer>", False),
        ("<thinking>A.</thinking><answer>mass</answer>", False),
    ],
)
def test_format(text: str, follows: bool) -> None:
    assert follows_format(Completion((1,), text, "stop"), "think") is follows
    assert not follows_format(Completion((1,), text, "length"), "think")


def test_format_of_a_long_text_is_found_quickly() -> None:
    text = "<think>" + "< " * 20_000 + "<answer>"
    assert not follows_format(Completion((1,), text, "stop"), "think")


def test_equal_ids_of_two_data_sets_are_two_questions() -> None:
    assert item("1", dataset="a").question_id != item("1", dataset="b").question_id
    assert item("1", dataset="a").question_id == item("1", "xx", dataset="a", sample=3).question_id


def test_a_trace_says_everything() -> None:
    one = item("7", "vx", correct=True, dataset="slake", sample=2, exact=True, lexical=0.75, tokens=9, finish="length")
    example = Example("7", (Path("/data/a.png"),), "Where?", "left", "Because.", "test", {"dataset": "slake"})
    one = Assessed(one.dataset, example, one.sample, one.scored, one.answer_verdict, one.well_formed)
    record = json.loads(json.dumps(trace_record(one, "base")))
    expected = {
        "id": "7",
        "dataset": "slake",
        "model": "base",
        "question": "Where?",
        "gold": "left",
        "rationale": "Because.",
        "images": ["/data/a.png"],
        "sample": 2,
        "text": "text",
        "answer": "answer",
        "correct": True,
        "exact": True,
        "lexical": 0.75,
        "unjudged": None,
        "reward": {"answer": 0.75, "process": None, "length": 0.0},
        "finish_reason": "length",
        "num_tokens": 9,
    }
    assert {key: record[key] for key in expected} == expected
    step = {"text": "step 1", "valid": False, "gold_alignment": False, "answer_contribution": False, "reason": "is x"}
    assert record["steps"][1] == step


def test_a_trace_tells_why_nothing_was_judged() -> None:
    record = trace_record(item("1", None, correct=None), "base")
    assert record["unjudged"] == "steps: no word; answer: no word"
    assert record["correct"] is None
    assert [step["valid"] for step in record["steps"]] == [None] * 3
    assert trace_record(item("1", "v", correct=None), "base")["unjudged"] == "answer: no word"
