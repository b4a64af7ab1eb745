"""The exact judge of phantom rationales: it knows the scene, and forgives nothing.

A step is valid when it is exactly a sentence of the phantom language, is true of the scene, belongs to the gold
rationale of the question, says nothing that was said before, and leaves out no finding that the gold rationale names
before it. Looser rules are gamed: when any true statement counts, a policy learns to drop the findings that it may get
wrong and to pad with true remarks that lead nowhere.
"""

from __future__ import annotations

from collections import Counter

from mrpo.data.phantom.language import Statement, parse
from mrpo.data.phantom.questions import Question, Reading, reason
from mrpo.data.phantom.scene import Scene
from mrpo.judge import EmbeddedJudge
from mrpo.records import Example, JudgeRequest, StepVerdict, Unjudged, Verdict


class PhantomJudge(EmbeddedJudge):
    """Judges the steps of phantom examples; any other example is `Unjudged`."""

    name = "phantom-strict"

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        if "scene" not in request.example.metadata:
            return Unjudged(f"{request.example.id} is no phantom example: it has no scene")
        reader = _Reader(request.example)
        return Verdict(tuple(reader.read(step) for step in request.steps))


class _Reader:
    """Reads the steps of one rationale in order and remembers which gold findings were mentioned.

    A finding that was stated wrongly counts as mentioned: the wrong step is invalid, later true ones stay valid. A
    false step about something that no gold finding speaks of ("The liver holds two lesions" where the spleen does)
    stands for one gold finding of its kind.
    """

    def __init__(self, example: Example) -> None:
        question = example.metadata["question"]
        self._answer = example.answer
        self._scene = Scene.from_facts(example.metadata["scene"])
        self._question = Question(question["kind"], example.question, question["organ"])
        self._gold, _ = reason(Reading(self._scene), self._question)
        self._gold_topics = [statement.topic for statement in self._gold]
        self._mentioned: set[tuple[str | int, ...]] = set()
        self._said: set[Statement] = set()
        self._misplaced: Counter[str] = Counter()

    def read(self, text: str) -> StepVerdict:
        statement = parse(text.strip())
        if statement is None:
            return StepVerdict(False, False, "not a statement of the phantom language")
        fault = self._find_fault(statement)
        self._remember(statement)
        if fault:
            return StepVerdict(False, False, fault)
        return StepVerdict(True, self._question.needs(statement), "true, needed and in order")

    def _is_true(self, statement: Statement) -> bool:
        return statement.is_true(self._scene, self._answer)

    def _find_fault(self, statement: Statement) -> str | None:
        if statement in self._said:
            return "repeats an earlier step"
        if not self._is_true(statement):
            return "false of the scene"
        if statement not in self._gold:
            return "true, but no part of the reasoning that the question needs"
        if statement.topic in self._mentioned:
            return "contradicts an earlier step"
        if skipped := self._find_skipped(statement):
            return f"skips a finding: {skipped.text}"
        return None

    def _remember(self, statement: Statement) -> None:
        if statement in self._said:
            return
        self._said.add(statement)
        if statement in self._gold or not self._is_true(statement):
            # A true remark beside the point mentions nothing: it must not stand in for a finding it avoids.
            self._mentioned.add(statement.topic)
            self._misplaced[statement.kind] += statement.topic not in self._gold_topics

    def _find_skipped(self, statement: Statement) -> Statement | None:
        """The first gold finding before `statement` that no earlier step mentions, rightly or wrongly."""
        misplaced = self._misplaced.copy()
        for gold in self._gold[: self._gold.index(statement)]:
            if gold.topic in self._mentioned:
                continue
            if not misplaced[gold.kind]:
                return gold
            misplaced[gold.kind] -= 1
        return None
