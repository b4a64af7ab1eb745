"""The second half of a step: verdicts come in, and completions become rows with advantages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mrpo import algorithms
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.records import ScoredCompletion
from mrpo.runtime import Runtime
from mrpo.sampling import Sampled
from mrpo.scoring import COLUMNS, Scorer, check_judged, columns, score_table
from mrpo.shaping import token_advantages
from mrpo.stopwatch import Stopwatch


@dataclass
class JudgedRows:
    """The completions of one step of this process, of which `parts` makes rows as their verdicts arrive.

    Afterwards `rows`, a list that is filled in place, and `scored` hold all of them, group by group, and `table` the
    score table of all processes.
    """

    config: Config
    runtime: Runtime
    scorer: Scorer
    stopwatch: Stopwatch
    sampled: Sampled
    rows: list[Row] = field(init=False)
    scored: list[ScoredCompletion] = field(init=False, default_factory=list)
    table: Mapping[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = list(self.sampled.rows)

    def parts(self) -> Iterator[tuple[list[Row], bool]]:
        """Rows with their advantages, and whether they are the last. Every process must iterate in step, once.

        With `update.streamed` a part is what has been judged by the time that it is asked for, at least one prompt;
        else it is everything. A process that has no more gives empty parts until the others have none either.

        Raises:
            UnjudgedError: more completions stayed unjudged than `judge.max_unjudged` allows.
        """
        size = self.config.rollout.group_size
        waiting = list(range(0, len(self.rows), size))
        found: dict[int, ScoredCompletion] = {}
        own_scores = torch.empty(len(self.rows), len(COLUMNS), dtype=torch.float64)
        with self.stopwatch.measure("rewards"):
            answers = self.scorer.reward_answers(self.sampled.pending)
        # GDPO normalises over the whole batch.
        by_group = self.config.algorithm != "gdpo"
        is_last = False
        while not is_last:
            with self.stopwatch.measure("judge_wait"):
                ready = self._judged(waiting) if self.config.update.streamed and by_group else waiting
                places = [i for first in ready for i in range(first, first + size)]
                scored = self.scorer.collect([self.sampled.pending[i] for i in places], [answers[i] for i in places])
            waiting = [first for first in waiting if first not in ready]
            found |= zip(places, scored, strict=True)
            own_scores[places] = scores = score_table(scored, self.config.advantage.tau).view(-1, len(COLUMNS))
            is_last = not self.runtime.any(bool(waiting))
            if is_last:
                self.scored = [found[i] for i in range(len(self.rows))]
                self.table = columns(self.runtime.gather_rows(own_scores))
                unjudged = self.table["unjudged"].mean().item()
                check_judged(unjudged, self.scored, "a step's completions", self.config.judge, self.runtime)
            yield self._with_advantages(places, scored, scores if by_group else None), is_last

    def _judged(self, waiting: Sequence[int]) -> list[int]:
        """Of the groups that begin at these places, those that have their verdicts."""
        size = self.config.rollout.group_size
        groups = [self.sampled.pending[first : first + size] for first in waiting]
        return [waiting[i] for i in self.scorer.judged_groups(groups)]

    def _with_advantages(
        self, places: Sequence[int], scored: Sequence[ScoredCompletion], scores: torch.Tensor | None
    ) -> list[Row]:
        """The rows at `places`, whose completions are `scored`, compared among `scores`; None: in the whole batch."""
        if not places:
            return []
        if scores is not None:
            advantages = self._advantages(columns(scores))
        else:
            advantages = self._advantages(self.table)[self.runtime.rank * len(places) :][: len(places)]
        for place, values in zip(places, token_advantages(self.config, scored, advantages), strict=True):
            self.rows[place] = replace(self.rows[place], advantages=values)
        return [self.rows[place] for place in places]

    def _advantages(self, table: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B,) advantages of the completions of a score table, whole groups."""
        shape = (-1, self.config.rollout.group_size)
        parts = (table[name].view(shape) for name in ("answer", "process", "length"))
        return algorithms.advantages(self.config, *parts).flatten()
