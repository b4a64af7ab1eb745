"""The process of one way of sampling: starts it, checks it, and times what it is asked for.

usage: rollout_worker.py WAY FOLDER PID
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before OpenMP starts, as in mrpo/train.py: a waiting thread spins briefly, then sleeps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from harness import free_memory, synchronize
from model_folders import examples
from rollout_checks import greedy_error, logprob_error, move, move_back
from rollout_setting import HF, REFERENCE, TRL, Setting
from rollout_ways import HfWay, ReferenceWay, VllmWay, Way
from way_mailbox import Mailbox, forget_peak, peak, run_way

from mrpo.records import EncodedPrompt
from mrpo.rollout import SamplingParams

# Prompts and completions of each that are compared with a plain forward pass.
_CHECKED_PROMPTS, _CHECKED_GROUP = 2, 2
# vLLM counts on from the seed of a prompt.
_SEEDS_APART = 1 << 10


class Worker:
    """Carries out commands with one way, which is started once."""

    def __init__(self, name: str, mailbox: Mailbox, folder: Path) -> None:
        self._name = name
        self._way: Way | None = None
        self._started: dict[str, float] = {}

    def carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{command['do']}")(command)

    def close(self) -> None:
        if self._way is not None:
            self._way.close()

    @property
    def way(self) -> Way:
        assert self._way is not None
        return self._way

    def _prepare(self, command: dict[str, Any]) -> dict[str, Any]:
        """What the start took, whenever it was."""
        self._setting = Setting(**command["setting"])
        if self._way is None:
            way = make_way(self._name, self._setting, command.get("cache", ""))
            self._started = way.start()
            self._way = way
        return {**self._started, "peak": float(peak())}

    def _check(self, command: dict[str, Any]) -> dict[str, Any]:
        """`logprobs`: mean |Δ log p| of samples; `greedy`: by how much a greedy token misses the largest logit."""
        prompts, trained = self._prompts(command["first"], _CHECKED_PROMPTS), self.way.trained
        greedy = self.way.sample(prompts, SamplingParams(1, self._setting.length, 0.0))
        found = {"greedy": greedy_error(trained.model, trained.processor, prompts, greedy)}
        logprobs = self._logprob_error(prompts, command["first"])
        return found if logprobs is None else {**found, "logprobs": logprobs}

    def _logprob_error(self, prompts: Sequence[EncodedPrompt], first: int) -> float | None:
        trained = self.way.trained
        groups = self.way.sample(prompts, self._params(_CHECKED_GROUP, first, len(prompts)))
        return logprob_error(trained.model, trained.processor, prompts, groups)

    def _check_sync(self, command: dict[str, Any]) -> dict[str, Any]:
        """Mean |Δ log p| of samples after a sync of moved weights, against these, those before, and back again."""
        first, trained = command["first"], self.way.trained
        prompts = self._prompts(first, _CHECKED_PROMPTS)
        before = move(trained.model)
        self.way.sync()
        groups = self.way.sample(prompts, self._params(_CHECKED_GROUP, first, len(prompts)))
        synced = logprob_error(trained.model, trained.processor, prompts, groups)
        move_back(trained.model, before)
        stale = logprob_error(trained.model, trained.processor, prompts, groups)
        del before
        self.way.sync()
        return {"synced": synced, "stale": stale, "restored": self._logprob_error(prompts, first)}

    def _round(self, command: dict[str, Any]) -> dict[str, Any]:
        """All completions of new prompts, from encoded prompts on; scaled up where only some are measured."""
        setting, first = self._setting, command["first"]
        count = setting.prompts
        if self._name == REFERENCE:
            count = min(setting.measured_prompts or count, count)
        prompts, params = self._prompts(first, count), self._params(setting.group, first, count)
        _be_still()
        began = time.perf_counter()
        groups = self.way.sample(prompts, params)
        synchronize()
        seconds = time.perf_counter() - began
        tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        scale = setting.prompts / count
        return {"seconds": seconds * scale, "tokens": tokens * scale, "peak": float(peak())}

    def _sync(self, command: dict[str, Any]) -> dict[str, Any]:
        _be_still()
        began = time.perf_counter()
        self.way.sync()
        synchronize()
        seconds = time.perf_counter() - began
        parameters = list(self.way.trained.model.parameters())
        size = {"parameters": sum(p.numel() for p in parameters), "bytes": sum(p.nbytes for p in parameters)}
        return {"seconds": seconds, "peak": float(peak()), **size}

    def _nap(self, command: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(self._way, VllmWay)
        prompts = self._prompts(command["first"], _CHECKED_PROMPTS)
        found = self._way.nap()
        after = {"logprobs": self._logprob_error(prompts, command["first"]), "peak": float(peak())}
        return {**self._started, **found, **after}

    def _prompts(self, first: int, count: int) -> list[EncodedPrompt]:
        setting, processor = self._setting, self.way.trained.processor
        found = examples(Path(setting.model), count, setting.image_tokens, first)
        return [processor.encode_prompt(example) for example in found]

    def _params(self, group: int, first: int, count: int) -> SamplingParams:
        seeds = tuple((first + number) * _SEEDS_APART for number in range(count))
        return SamplingParams(group, self._setting.length, 1.0, seeds)


def _be_still() -> None:
    """Nothing is under way, and memory that the checks took is given back."""
    free_memory()
    forget_peak()
    synchronize()


def make_way(name: str, setting: Setting, cache: str) -> Way:
    """The way of this name; only what it needs is imported."""
    if name == HF:
        return HfWay(setting)
    if name == REFERENCE:
        return ReferenceWay(setting)
    if name == TRL:
        from rollout_trl import TrlWay

        return TrlWay(setting)
    return VllmWay(name, setting, cache)


if __name__ == "__main__":
    run_way(Worker)
