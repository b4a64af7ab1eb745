"""A reward manager for verl: MRPO's rewards, and the verdicts that `mrpo.integrations.verl` shapes advantages with."""

from __future__ import annotations

from typing import Any, ClassVar

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from mrpo.config import Config
from mrpo.integrations.rewards import StepRewards
from mrpo.integrations.verl import FIELD, step_record
from mrpo.judge import Judge


class StepRewardManager(RewardManagerBase):
    """Subclass it and set `judge`; verl loads the subclass with `reward.reward_manager.source=importlib`.

    Rows need verl's `reward_model.ground_truth`, the gold answer; `extra_info` may hold `question`, `rationale`,
    `images` and `metadata` as `mrpo.integrations.rewards.example_of` reads them.
    """

    judge: ClassVar[Judge]
    think_tag: ClassVar[str] = "think"
    mrpo_config: ClassVar[Config] = Config()

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._steps = StepRewards(self.judge, tokenizer, think_tag=self.think_tag, config=self.mrpo_config)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The score of one response and, beside it, its parts and its record."""
        item = data[-1]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(responses) :].sum())
        token_ids = responses[:length].tolist()
        fields = item.non_tensor_batch
        row = {**(fields.get("extra_info") or {}), "answer": fields["reward_model"]["ground_truth"]}
        row.setdefault("prompt", fields.get("raw_prompt", ""))
        scored = (await self.loop.run_in_executor(None, self._steps.score, [row], [token_ids]))[0]
        rewards, weights = scored.rewards, self.mrpo_config.reward
        score = weights.answer_weight * rewards.answer + weights.length_weight * rewards.length
        if rewards.process is not None:
            score += weights.process_weight * rewards.process
        info = {
            "answer_reward": rewards.answer,
            "process_reward": float("nan") if rewards.process is None else rewards.process,
            "length_reward": rewards.length,
            FIELD: step_record(scored, self.mrpo_config),
        }
        return {"reward_score": score, "reward_extra_info": info}
