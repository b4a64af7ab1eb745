"""A stand-in judge that compares words: deterministic, no network, no model, and no understanding.

It lets a run on real data go from start to end where no judge model is at hand, and its numbers say nothing about
medical truth: it cannot see the image, does not know synonyms, and misses a negation ("no effusion" counts as
"effusion"). Use `judge.kind=openai` for results.

A step is judged by its content words (stop words removed, endings stripped):

- *Gold Alignment*: at least `min_overlap` of them stand in the gold rationale, and no side is contradicted.
- *Answer Contribution*: one of them stands in the gold answer, or at least `min_overlap` of them stand in the question
  and the step adds a word that the question lacks; again no side is contradicted.
- An empty step, talk about the task, and a repetition of an earlier step get neither. Without a gold rationale only
  Answer Contribution is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mrpo.judge import EmbeddedJudge
from mrpo.records import JudgeRequest, StepVerdict, Verdict

REPEATED = 0.9  # share of common words (Jaccard) above which two steps say the same

_STOP_TEXT = """
    a about also an and any are as at be been being both but by can could did do does for from had has have here how
    hmm if in into is it its of ok okay on or shall should so some such sure than that the their then there therefore
    these they this those thus to very was we well were what when where which while who why will with would you
    your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
_SIDES = {"left": {"left"}, "right": {"right"}, "bilateral": {"left", "right"}, "bilaterally": {"left", "right"}}
_META_TALK = re.compile(
    r"(let me|let us|let's|i (need|will|should|must) |i'll |we (need|will|should|must) |to (answer|solve) (this|the) |"
    r"the (question|user|prompt|task) (asks|is asking|wants)|(think|thinking) step by step|step by step)",
    re.IGNORECASE,
)


class LexicalJudge(EmbeddedJudge):
    """The word-comparing stand-in; `min_overlap` in [0, 1] is the share of a step's words that must be found."""

    name = "lexical"

    def __init__(self, *, min_overlap: float) -> None:
        self._min_overlap = min_overlap

    def judge_one(self, request: JudgeRequest) -> Verdict:
        return self.compare(request, [False] * len(request.steps))

    def compare(self, request: JudgeRequest, means_the_same: Sequence[bool]) -> Verdict:
        """The verdict, where `means_the_same` says of each step that something else found it in the gold rationale."""
        verdicts: list[StepVerdict] = []
        earlier: list[frozenset[str]] = []
        for step, same in zip(request.steps, means_the_same, strict=True):
            words = content_words(step)
            if _META_TALK.match(step.strip()):
                verdicts.append(StepVerdict(False, False, "talks about the task"))
            elif not words:
                verdicts.append(StepVerdict(False, False, "says nothing"))
            elif any(len(words & other) > REPEATED * len(words | other) for other in earlier):
                verdicts.append(StepVerdict(False, False, "repeats an earlier step"))
            else:
                verdicts.append(self._compare_step(words, request, same))
            earlier.append(words)
        return Verdict(tuple(verdicts))

    def _compare_step(self, words: frozenset[str], request: JudgeRequest, means_the_same: bool) -> StepVerdict:
        example = request.example
        gold, answer = content_words(example.rationale or ""), content_words(example.answer)
        question = content_words(example.question)
        gold_sides = sides(gold | answer)
        if gold_sides and sides(words) - gold_sides:
            return StepVerdict(False, False, f"names another side than {' and '.join(sorted(gold_sides))}")
        aligned = bool(gold) and (means_the_same or self._enough(words, gold))
        on_topic = self._enough(words, question) and bool(words - question)
        contributes = bool(words & answer) or on_topic
        return StepVerdict(aligned, contributes, "" if aligned or contributes else "shares too few words with the gold")

    def _enough(self, words: frozenset[str], reference: frozenset[str]) -> bool:
        common = len(words & reference)
        return common > 0 and common >= self._min_overlap * len(words)


def content_words(text: str) -> frozenset[str]:
    """The words of `text` that carry meaning: lower case, stop words removed, endings stripped."""
    words = re.findall(r"[^\W_]+", text.lower().replace("'s", ""))
    return frozenset(_stem(word) for word in words if word not in _STOP_WORDS)


def sides(words: frozenset[str]) -> set[str]:
    """The sides, left and right, that `words` name."""
    return {side for word in words for side in _SIDES.get(word, ())}


def _stem(word: str) -> str:
    for ending, replacement in (("sses", "ss"), ("ies", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", "")):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith(("ss", "is", "us")):
            word = word[: -len(ending)] + replacement
            break
    return word.rstrip("e") if len(word) > 4 else word
