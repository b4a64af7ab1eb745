"""What supervised fine-tuning imitates."""

from __future__ import annotations

from collections.abc import Sequence

from mrpo.data.phantom import PhantomDataset
from mrpo.records import Example


def explained(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples with a gold rationale, in order."""
    # Phantom explains every question, and draws a picture for each one that is looked at.
    if isinstance(examples, PhantomDataset):
        return examples
    return tuple(example for example in examples if example.rationale and example.rationale.strip())


def sft_target(example: Example) -> tuple[str, str]:
    """(rationale, answer): the gold ones, unless the data set tells the rationale of a reader who errs.

    The rationale is empty where the example has none.
    """
    return example.rationale or "", example.metadata.get("target_answer", example.answer)
