"""A whole step as the paper's code does it: everything two completions at a time, everything one after the other.

Per micro-batch of two completions of one prompt: Hugging Face's `generate`, then the judge (its two requests at once,
while nothing else happens), then a dense pass with full logits over prompt and completion. Activations are kept: in
the paper's code generation leaves the model in evaluation mode, which switches gradient checkpointing off. On four GPUs
a group of eight is spread over processes; here its four pairs are sampled and judged in turn, which costs the same.
Judge client and rewards are ours, and AdamW is PyTorch's without ZeRO: what is measured is no slower than the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import peers
import torch
from model_folders import examples
from plain_generate import generate
from step_ours import make_config
from step_setting import FROZEN, GRPO, REFERENCE_MICRO_BATCH, Setting
from step_way import CountingScorer, Sampled, compared_names, compared_part, plain_name, same_adapters
from update_ways import _all_logprobs

from mrpo.algorithms import group_advantages
from mrpo.backbones import load_model, load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config
from mrpo.judge import make_judge
from mrpo.records import Completion, EncodedPrompt, Example
from mrpo.stopwatch import Stopwatch


class ReferenceWay:
    """One process."""

    def __init__(self) -> None:
        self._scorer: CountingScorer | None = None
        self._stopwatch = Stopwatch()
        self._draws = 0

    def prepare(self, setting: Setting, folder: Path) -> None:
        self.close()
        self._setting = setting
        self._config: Config = make_config(setting, ahead=False, algorithm=GRPO, folder=folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = getattr(torch, self._config.model.dtype)
        self._processor = own = load_processor(self._config)
        self._model = load_model(self._config.model).to(self._device)
        same_adapters(self._model)
        judge = make_judge(self._config.judge, "phantom")
        self._scorer = CountingScorer(self._config, judge, own.tokenizer, own.think_tag)
        self._examples = examples(Path(setting.model), setting.prompts, setting.image_tokens)
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.requires_grad], lr=FROZEN, weight_decay=0.0
        )

    def step(self, algorithm: str, index: int | None) -> dict[str, float]:
        """The whole step, or its first `rounds` micro-batches and the optimizer, of which the former are scaled up."""
        setting, stopwatch = self._setting, self._stopwatch
        total = setting.samples // REFERENCE_MICRO_BATCH
        remaining = measured = min(setting.rounds or total, total)
        tokens = 0
        for example in self._examples:
            pairs = min(remaining, setting.group // REFERENCE_MICRO_BATCH)
            if not pairs:
                break
            prompt = self._processor.encode_prompt(example)
            completions, rewards = self._sample_and_judge(example, prompt, pairs)
            advantages = group_advantages(torch.tensor([rewards]), normalize="group_std")[0].tolist()
            with stopwatch.measure("update"):
                self._backward([_row(prompt, c, a, setting) for c, a in zip(completions, advantages, strict=True)])
                self._synchronize()
            tokens += sum(len(completion.token_ids) for completion in completions)
            remaining -= pairs
        seconds = {name: value * total / measured for name, value in stopwatch.take().items()}
        with stopwatch.measure("optimizer"):
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._synchronize()
        seconds["update"] += stopwatch.take()["optimizer"]
        assert self._scorer is not None
        found = {"seconds": sum(seconds.values()), "tokens": tokens * total / measured, "judged": self._scorer.take()}
        return found | {f"{name} s": value for name, value in seconds.items()}

    def _sample_and_judge(
        self, example: Example, prompt: EncodedPrompt, pairs: int
    ) -> tuple[list[Completion], list[float]]:
        assert self._scorer is not None
        completions: list[Completion] = []
        rewards: list[float] = []
        for _ in range(pairs):
            with self._stopwatch.measure("rollout"):
                self._draws += 1
                pair = generate(
                    self._model,
                    self._processor,
                    prompt,
                    count=REFERENCE_MICRO_BATCH,
                    max_tokens=self._setting.length,
                    temperature=1.0,
                    seed=self._draws,
                )
            with self._stopwatch.measure("judge"):
                scored = self._scorer.collect([self._scorer.submit(example, completion) for completion in pair])
            completions += pair
            rewards += [i.rewards.answer + (i.rewards.process or 0.0) + i.rewards.length for i in scored]
        return completions, rewards

    def gradients(self, sampled: Sequence[Sampled]) -> Mapping[str, torch.Tensor]:
        prompts = {example.id: self._processor.encode_prompt(example) for example in self._examples}
        self._optimizer.zero_grad()
        self._backward(
            [
                _row(prompts[one.example], Completion(one.token_ids, "", "length"), one.advantage, self._setting)
                for one in sampled
            ]
        )
        gradients = {plain_name(name): p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        found = {name: compared_part(gradients[name]) for name in compared_names(gradients)}
        self._optimizer.zero_grad()
        return found

    def _backward(self, rows: Sequence[Row]) -> None:
        logprobs_of = partial(_all_logprobs, self._model)
        for start in range(0, len(rows), REFERENCE_MICRO_BATCH):
            batch = collate(rows[start : start + REFERENCE_MICRO_BATCH], self._processor, self._device, self._dtype)
            peers.clipped(batch, logprobs_of(batch).float()).backward()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None


def _row(prompt: EncodedPrompt, completion: Completion, advantage: float, setting: Setting) -> Row:
    """With the mean over tokens, then over all completions of the step, as its weights."""
    length = len(completion.token_ids)
    weight = 1.0 / (length * setting.samples)
    return Row(prompt, completion.token_ids, torch.full((length,), advantage), torch.full((length,), weight))
