"""MRPO's three rewards as reward functions of trainers that hand over rows of a data set and completion token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.judge import Judge
from mrpo.records import Completion, Example, ScoredCompletion
from mrpo.scoring import Scorer, columns, score_table

Row = Mapping[str, Any]
RewardFunction = Callable[..., list[float | None]]

METRICS = ("correct", "num_steps", "valid_steps", "fully_valid", "early", "mid", "late", "far", "unjudged")


def example_of(row: Row) -> Example:
    """The example that a row of a training set describes.

    Columns: `answer` or `solution`, the gold answer; optional are `question` (else the text of the last user message
    of `prompt`), `rationale`, `image` or `images` (pictures or paths), `metadata` (a mapping, or JSON text), `id`.

    Raises:
        UserError: there is no gold answer.
    """
    answer = row.get("answer")
    if answer is None:
        answer = row.get("solution")
    if answer is None:
        raise UserError(f"rows need a column answer (or solution) with the gold answer; there are {sorted(row)}")
    image, images = row.get("image"), row.get("images")
    if images is None or len(images) == 0:  # an array has no truth value
        images = [] if image is None else [image]
    metadata = row.get("metadata") or {}
    return Example(
        id=str(row.get("id", "")),
        images=tuple(Path(image) if isinstance(image, str) else image for image in images),
        question=row.get("question") or _last_user_text(row.get("prompt", "")),
        answer=str(answer),
        rationale=row.get("rationale"),
        split="train",
        metadata=json.loads(metadata) if isinstance(metadata, str) else metadata,
    )


def _last_user_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    content = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


class StepRewards:
    """Finds the steps of completions in their own token ids, has them judged, and computes the rewards.

    `scored` holds what became of the last batch, in its order. `tokenizer` and `think_tag` may still be set before the
    first one.
    """

    def __init__(self, judge: Judge, tokenizer: Any, *, think_tag: str, config: Config | None = None) -> None:
        """`config.reward` sets the rewards and `config.advantage.tau` what counts as a correct answer in metrics."""
        self.tokenizer = tokenizer
        self.think_tag = think_tag
        self.scored: list[ScoredCompletion] = []
        self._judge = judge
        self._config = config or Config()
        self._last_ids: Sequence[Sequence[int]] | None = None

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._config, self._judge, self.tokenizer, self.think_tag)

    def score(self, rows: Sequence[Row], completion_ids: Sequence[Sequence[int]]) -> list[ScoredCompletion]:
        """One result for each row and the token ids of its completion, end token included."""
        return self._scorer.collect(
            [
                self._scorer.submit(example_of(row), self._completion(ids))
                for row, ids in zip(rows, completion_ids, strict=True)
            ]
        )

    def functions(self) -> list[RewardFunction]:
        """answer_reward, process_reward and length_reward in the form of TRL's reward functions.

        They take `completion_ids` and the columns of the data set as lists, and share one scoring of a batch: the
        judge is asked once for each list object `completion_ids`. An unjudged completion has None as process reward.
        """

        def answer_reward(**batch: Any) -> list[float | None]:
            return [item.rewards.answer for item in self._scored(batch)]

        def process_reward(**batch: Any) -> list[float | None]:
            return [item.rewards.process for item in self._scored(batch)]

        def length_reward(**batch: Any) -> list[float | None]:
            return [item.rewards.length for item in self._scored(batch)]

        return [answer_reward, process_reward, length_reward]

    def _scored(self, batch: Mapping[str, Any]) -> list[ScoredCompletion]:
        completion_ids = batch["completion_ids"]
        if completion_ids is not self._last_ids:
            names = {"prompts": "prompt"}
            lists = {
                names.get(name, name): values
                for name, values in batch.items()
                if isinstance(values, list) and len(values) == len(completion_ids)
            }
            rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
            self.scored = self.score(rows, completion_ids)
            self._last_ids = completion_ids
            if log_metric := batch.get("log_metric"):
                self._log(log_metric)
        return self.scored

    def _log(self, log_metric: Callable[[str, float], None]) -> None:
        table = columns(score_table(self.scored, self._config.advantage.tau))
        metrics = {f"steps/{name}": table[name].nanmean().item() for name in METRICS} | self._scorer.judge_stats()
        for name, value in metrics.items():
            if not math.isnan(value):
                log_metric(name, value)

    def _completion(self, ids: Sequence[int]) -> Completion:
        token_ids = tuple(ids)
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = token_ids[-1:] == (self.tokenizer.eos_token_id,)
        return Completion(token_ids, text, "stop" if ended else "length")
