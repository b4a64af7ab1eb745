"""What supervised fine-tuning imitates."""

from __future__ import annotations

from mrpo.records import Example


def sft_target(example: Example) -> tuple[str, str]:
    """(rationale, answer): the gold ones, unless the data set tells the rationale of a reader who errs.

    The rationale is empty where the example has none.
    """
    return example.rationale or "", example.metadata.get("target_answer", example.answer)
