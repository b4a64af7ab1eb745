from __future__ import annotations

from pathlib import Path

import pytest
from completion_rows import completion_row, question_row, write_rows

from mrpo.assessment import Assessor, ModelCompletions, read_models
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.errors import UserError
from mrpo.records import Unjudged


def model(tmp_path: Path, *rows: dict) -> ModelCompletions:
    return read_models([write_rows(tmp_path / "m.jsonl", rows)], [])[0]


def phantom_row(index: int, **changes: object) -> dict:
    """A phantom question answered as its gold rationale does."""
    example = PhantomDataset("test", size=index + 1)[index]
    sentences = [f"{sentence}." for sentence in (example.rationale or "").rstrip(".").split(". ")]
    metadata = dict(example.metadata)
    row = question_row(example.id, [completion_row(example.answer, sentences)], dataset="phantom", metadata=metadata)
    return row | {"question": example.question, "answer": example.answer, "rationale": example.rationale} | changes


def test_each_data_set_has_its_own_judge(tmp_path: Path) -> None:
    scan = question_row(
        "1",
        [completion_row("the left lung", ["A CT of the chest.", "Let me think.", "A nodule in the left lung."])],
        dataset="vqa_rad",
        answer="left lung",
        rationale="A chest CT shows a nodule in the left lung.",
    )
    phantom, slake = phantom_row(0), scan | {"dataset": "slake"}
    assessor = Assessor(Config.model_validate({"advantage": {"tau": 0.73}}), None)
    found = assessor.assess(model(tmp_path, scan, phantom, slake), lambda count: None)
    assert [item.dataset for item in found] == ["vqa_rad", "phantom", "slake"]
    for item in (found[0], found[2]):
        assert item.validity == (True, False, True)
        assert item.correct is True  # ROUGE-1 F1 0.8 and BLEU-1 2/3: 0.733 on average
        assert not item.exact
        assert item.lexical == pytest.approx((0.8 + 2 / 3) / 2)
    assert all(found[1].validity or ())
    assert len(found[1].validity or ()) >= 4
    assert (found[1].correct, found[1].exact, found[1].well_formed) == (True, True, True)
    assert found[1].scored.rewards.process == 1.0
    assert assessor.judge_name(["phantom", "slake"]) == "steps: phantom-strict, lexical; answers: exact, lexical"


def test_phantom_answers_must_be_exact(tmp_path: Path) -> None:
    row = phantom_row(0)
    near = completion_row(f"so it is {row['answer']}")
    (item,) = Assessor(Config(), None).assess(model(tmp_path, row | {"completions": [near]}), lambda count: None)
    assert item.correct is False


def test_every_completion_of_every_question_in_order(tmp_path: Path) -> None:
    rows = [
        question_row(str(i), [completion_row(answer) for answer in ("gold", None, "silver")], dataset="ab"[i % 2])
        for i in range(50)
    ]
    counts: list[int] = []
    config = Config.model_validate({"judge": {"concurrency": 4}})  # batches of 32
    found = Assessor(config, None).assess(model(tmp_path, *rows), counts.append)
    assert [(item.example.id, item.sample) for item in found] == [(str(i), k) for i in range(50) for k in range(3)]
    assert [item.correct for item in found] == [True, False, False] * 50
    assert sum(counts) == 150
    assert len(counts) == 5


def test_too_many_unjudged_stop_the_evaluation(tmp_path: Path) -> None:
    broken = [phantom_row(i, metadata={}) for i in range(2)]  # without its scene no judge can tell
    rows = [phantom_row(i) for i in range(2, 4)] + broken
    (*_, unjudged) = Assessor(Config(), None).assess(model(tmp_path, *rows), lambda count: None)
    assert isinstance(unjudged.scored.verdict, Unjudged)
    assert unjudged.correct is True
    strict = Config.model_validate({"judge": {"max_unjudged": 0.4}})
    with pytest.raises(UserError, match=r"left 2 of 4 .*judge\.max_unjudged=0\.4: .*has no scene"):
        Assessor(strict, None).assess(model(tmp_path, *rows), lambda count: None)
