"""The phantom questions as a data set of `Example`s, and the vocabulary that they are written in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import overload

from mrpo.data.phantom.corrupt import misread
from mrpo.data.phantom.language import ANSWERS, TEMPLATES, Statement
from mrpo.data.phantom.questions import WORDINGS, Reading, draw_case, reason
from mrpo.data.phantom.render import LOOKS, Look, render
from mrpo.data.phantom.scene import ORGANS, SPLITS, Split
from mrpo.errors import UserError
from mrpo.records import Example


class PhantomDataset(Sequence[Example]):
    """`size` questions about procedural scenes, made on demand and fixed by (seed, split, index).

    `example.answer` is always the truth. With `corruption` > 0, `example.rationale` and `metadata["target_answer"]`
    are those of a reader who misread the scene: what `mrpo.data.targets.sft_target` gives. `metadata` further holds
    the true `scene`, the `question` (kind and organ), the `gold_rationale`, and the names of the `misreadings`.
    Questions and scenes are the same in every `look`; only the pictures differ.

    Raises:
        UserError: an unknown split or look, a negative size, or a corruption outside [0, 1].
    """

    def __init__(
        self, split: Split, *, size: int, seed: int = 0, corruption: float = 0.0, look: Look = "plain"
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"phantom has no split {split!r}; it has {', '.join(SPLITS)}")
        if look not in LOOKS:
            raise UserError(f"phantom has no look {look!r}; it has {', '.join(LOOKS)}")
        if size < 0:
            raise UserError(f"the size of a phantom split must be 0 or more, not {size}")
        _check_corruption(corruption)
        self.split, self.size, self.seed, self.corruption, self.look = split, size, seed, corruption, look

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(self.size))]
        return self.example(index)

    def example(self, index: int, *, corruption: float | None = None) -> Example:
        """Question `index`, told with this corruption instead of the data set's own."""
        if not -self.size <= index < self.size:
            raise IndexError(f"phantom {self.split} has {self.size} questions; there is no index {index}")
        if corruption is not None:
            _check_corruption(corruption)
        index %= self.size
        name = f"phantom/{self.seed}/{self.split}/{index}"
        scene, question = draw_case(random.Random(name), self.split)
        gold, answer = reason(Reading(scene), question)
        # Its own stream: corruption never changes which scene is shown.
        reading, misreadings = misread(
            scene, question, self.corruption if corruption is None else corruption, random.Random(f"{name}/misread")
        )
        told, target_answer = reason(reading, question)
        return Example(
            id=name,
            images=(render(scene, self.look),),
            question=question.text,
            answer=answer,
            rationale=write(told),
            split=self.split,
            metadata={
                "scene": scene.to_facts(),
                "question": {"kind": question.kind, "organ": question.organ},
                "gold_rationale": write(gold),
                "target_answer": target_answer,
                "misreadings": misreadings,
            },
        )


def _check_corruption(corruption: float) -> None:
    if not 0.0 <= corruption <= 1.0:
        raise UserError(f"phantom corruption must lie in [0, 1], not {corruption}")


def write(statements: Sequence[Statement]) -> str:
    """The statements as running text."""
    return " ".join(statement.text for statement in statements)


def corpus() -> Iterator[str]:
    """Texts that hold every word of phantom questions, rationales and answers, at the start of a text and after a
    space: what a tokenizer for phantom is trained on."""
    sentences = [sentence for template in TEMPLATES.values() for sentence in template.instances()]
    questions = [w.format(organ=organ) for wordings in WORDINGS.values() for w in wordings for organ in ORGANS]
    for text in (*sentences, *questions, *ANSWERS):
        yield text
        yield f" {text}"
