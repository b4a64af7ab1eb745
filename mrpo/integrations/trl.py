"""MRPO in TRL: a `GRPOTrainer` whose advantages follow the reasoning steps, and whose loss is our fused one.

TRL keeps what it does well: generation (its own, or vLLM), tools, the optimizer, DDP, DeepSpeed, logging, checkpoints.
Three of its methods are extended:

- `_calculate_rewards`: an unjudged completion gets the mean process reward of its group, instead of none;
- `_generate_and_score_completions`: the advantage of a completion becomes one of each token, (B, T);
- `_compute_loss`: loss and gradients come from `fused_linear_policy_loss` inside the model's own forward. TRL's own
  arithmetic still runs on the log-probabilities, without gradients, for its metrics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mrpo.algorithms import fill_unjudged
from mrpo.backbones import FAMILIES
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.integrations.rewards import RewardFunction, StepRewards
from mrpo.judge import Judge
from mrpo.records import Example
from mrpo.shaping import token_advantages

try:
    from datasets import Dataset, Features, Image, List, Value
    from trl import GRPOConfig, GRPOTrainer

    from mrpo.integrations.trl_head import LossTerms, ModelWithLoss, add_policy_head, head_problems
except ImportError as error:
    raise ImportError(f"mrpo.integrations.trl needs TRL 1.16 or later: pip install 'mrpo[trl]' ({error})") from error

__all__ = ["MRPOTrainer", "mrpo_reward_funcs", "to_dataset"]

PROCESS = 1  # the column of the process reward: answer, process, length, then the user's own
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def mrpo_reward_funcs(
    judge: Judge, tokenizer: Any, *, think_tag: str = "think", config: Config | None = None
) -> list[RewardFunction]:
    """The answer, process and length rewards for any trainer of TRL that takes reward functions.

    With TRL's own `GRPOTrainer` they train GRPO on the summed rewards. Note that TRL counts the process reward of an
    unjudged completion as 0; `MRPOTrainer` does not.
    """
    return StepRewards(judge, tokenizer, think_tag=think_tag, config=config).functions()


def to_dataset(examples: Iterable[Example], *, instruction: str = "") -> Dataset:
    """A data set for TRL with the columns that the rewards read, one row an example.

    Args:
        examples: of any of mrpo's data sets.
        instruction: text after each question, such as how to use the tags.
    """
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{e.question}\n{instruction}" if instruction else e.question}],
            "images": e.load_images(),
            "id": e.id,
            "question": e.question,
            "answer": e.answer,
            "rationale": e.rationale,
            "metadata": json.dumps(dict(e.metadata)),
        }
        for e in examples
    ]
    if not any(row["images"] for row in rows):
        for row in rows:
            del row["images"]
        return Dataset.from_list(rows)
    texts = {name: Value("string") for name in ("id", "question", "answer", "rationale", "metadata")}
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"prompt": List(message), "images": List(Image()), **texts}))


class MRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with MRPO's rewards, step-wise advantages and fused loss, for text and vision-language models.

    The training set needs what `mrpo.integrations.rewards.example_of` reads, beside TRL's own columns.
    """

    _tag_names = ["trl", "grpo", "mrpo"]  # noqa: RUF012
    _name = "MRPO"

    args: GRPOConfig
    model: Any
    max_completion_length: int
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        model: Any,
        judge: Judge,
        args: GRPOConfig | None = None,
        *,
        config: Config | None = None,
        think_tag: str | None = None,
        reward_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        fused_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model, args, and those not named here: as in `trl.GRPOTrainer`.
            judge: who judges the steps, such as `mrpo.judge.make_judge` gives or any object of its protocol.
            config: of its sections only `reward` and `advantage` count, and `algorithm`: `mrpo` or `grpo`. How rewards
                are normalised is TRL's to say (`scale_rewards`, `multi_objective_aggregation`), not
                `advantage.normalize`'s.
            think_tag: name of the reasoning tag; default: what the model family uses, "think" for an unknown one.
            reward_funcs: further rewards, added to the three of MRPO.
            fused_loss: False computes TRL's own loss, for settings that the fused one does not know.

        Raises:
            UserError: settings that do not fit together; the message names each.
        """
        self._config = config or Config()
        self._steps = StepRewards(judge, None, think_tag=think_tag or "think", config=self._config)
        extra = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        super().__init__(model, [*self._steps.functions(), *extra], args, **kwargs)
        self._steps.tokenizer = self._tokenizer
        self._steps.think_tag = think_tag or _think_tag(self.model.config.model_type)
        if self.args.reward_weights is None:
            section = self._config.reward
            self.reward_weights[:3] = torch.tensor(
                [section.answer_weight, section.process_weight, section.length_weight]
            )
        bare = self.accelerator.unwrap_model(self.model)
        bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
        self._check(fused_loss, bare)
        self._fused_loss = fused_loss
        if fused_loss:
            for each in (bare, self.ref_model):
                if each is not None:
                    add_policy_head(
                        self.accelerator.unwrap_model(each),
                        temperature=self.temperature,
                        head_in_fp32=self.args.cast_lm_head_to_fp32,
                    )

    def _check(self, fused_loss: bool, model: Any) -> None:
        if self._config.algorithm not in ("mrpo", "grpo"):
            raise UserError(
                f"algorithm={self._config.algorithm} does not run in MRPOTrainer; it must be mrpo or grpo "
                "(for gdpo: grpo with multi_objective_aggregation='normalize_then_sum')"
            )
        if self._config.algorithm == "mrpo":
            unfit = {"loss_type='vespo'": self.loss_type == "vespo"}
            unfit["off_policy_mask_threshold"] = self.off_policy_mask_threshold is not None
            if any(unfit.values()):
                names = ", ".join(name for name, found in unfit.items() if found)
                raise UserError(f"{names} needs one advantage a completion; MRPO has one a token")
        share = self.args.per_device_train_batch_size * (self.args.steps_per_generation or 1)
        if self._config.advantage.credit == "telescoped" and share % self.num_generations:
            raise UserError(
                f"advantage.credit=telescoped needs whole groups in each process: {share} completions of a process are "
                f"no multiple of num_generations={self.num_generations}"
            )
        problems = [*self._loss_problems(), *head_problems(model)] if fused_loss else []
        if problems:
            raise UserError(
                f"the fused loss does not know {'; '.join(problems)}. Change that, or pass fused_loss=False for TRL's "
                "own loss with the same advantages"
            )

    def _loss_problems(self) -> list[str]:
        """Settings of TRL that the fused loss does not know."""
        args = self.args
        found = {
            f"loss_type={self.loss_type!r} (only {', '.join(CLIPPED_LOSSES)})": self.loss_type not in CLIPPED_LOSSES,
            f"importance_sampling_level={self.importance_sampling_level!r}": self.importance_sampling_level != "token",
            f"delta={args.delta}": args.delta is not None,
            f"use_bias_correction_kl=True with beta={self.beta}": args.use_bias_correction_kl and self.beta != 0.0,
            f"off_policy_mask_threshold={self.off_policy_mask_threshold}": self.off_policy_mask_threshold is not None,
            f"top_entropy_quantile={self.top_entropy_quantile}": self.top_entropy_quantile < 1.0,
            "an entropy bonus (entropy_coef, use_adaptive_entropy)": self._entropy_bonus_enabled,
            "the router loss of a mixture of experts": self.aux_loss_enabled,
        }
        return [name for name, holds in found.items() if holds]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        # Where each reward is normalised alone, TRL leaves a missing one out by itself.
        if self.multi_objective_aggregation == "sum_then_normalize":
            rewards[:, PROCESS] = fill_unjudged(rewards[:, PROCESS].view(-1, self._group_size())).flatten()
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        if self._config.algorithm == "mrpo":
            plain = outputs["advantages"]
            rollout = self._config.rollout.model_copy(update={"group_size": self._group_size()})
            config = self._config.model_copy(update={"rollout": rollout})
            rows = token_advantages(config, self._steps.scored, plain.cpu())
            shaped = plain.new_zeros(outputs["completion_ids"].shape)
            for row, values in zip(shaped, rows, strict=True):
                row[: len(values)] = values
            outputs["advantages"] = shaped
        return outputs

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._fused_loss:
            return super()._compute_loss(model, inputs)
        with_loss = ModelWithLoss(model, self._loss_terms(inputs))
        super()._compute_loss(with_loss, inputs)  # for its metrics alone
        assert with_loss.loss is not None
        return with_loss.loss

    def _loss_terms(self, inputs: dict[str, Any]) -> LossTerms:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        # min() of both surrogates is linear in a factor that is never negative, so that this is TRL's correction.
        advantages = advantages * inputs.get("importance_sampling_ratio", 1.0)
        return LossTerms(
            advantages=advantages.expand(mask.shape),
            weights=self._token_weights(mask, inputs),
            old_logprobs=inputs.get("old_per_token_logps"),
            ref_logprobs=inputs.get("ref_per_token_logps"),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
        )

    def _token_weights(self, mask: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, T) weights whose sum with the token losses is the loss of TRL's `loss_type`."""
        mask, training = mask.float(), self.model.training
        accumulated = float(self.current_gradient_accumulation_steps or 1) if training else 1.0
        if self.loss_type == "dapo":  # its count of tokens spans the generation batch
            total = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return mask / (total * accumulated / self.args.steps_per_generation if training else total)
        if self.loss_type == "bnpo":
            return mask / (mask.sum().clamp(min=1.0) * accumulated)
        mean = mask / (len(mask) * accumulated)
        if self.loss_type == "grpo":
            return mean / mask.sum(-1, keepdim=True).clamp(min=1.0)
        return mean / self.max_completion_length if self.loss_type == "dr_grpo" else mean


def _think_tag(model_type: str) -> str:
    return next((family.think_tag for family in FAMILIES if model_type in family.model_types), "think")
