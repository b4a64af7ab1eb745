"""MRPO in verl: an advantage estimator, `algorithm.adv_estimator=mrpo`, and what carries the verdicts to it.

verl hands an estimator the summed rewards of each response, their mask and the group ids, but not what a reward manager
says beside its score (`reward_extra_info`), except to its own gdpo. `register` therefore wraps verl's
`compute_advantage`, which sees the whole batch, so that the estimator finds the verdicts there, in the field
`mrpo_steps`: one JSON text a response, made by `step_record`. `mrpo.integrations.verl_rewards` has a reward manager
that writes it; `VERL_USE_EXTERNAL_MODULES=mrpo.integrations.verl_plugin` registers the estimator in every process.

The functions here need no verl but `register`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from mrpo.algorithms import fill_unjudged, group_advantages
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.kernels import step_advantages
from mrpo.records import ScoredCompletion, Verdict

FIELD = "mrpo_steps"
_records: ContextVar[Sequence[str] | None] = ContextVar("mrpo_records", default=None)


def step_record(scored: ScoredCompletion, config: Config) -> str:
    """What the estimator must know of a response, as JSON: `correct`, `process` and `steps`.

    `steps` are [start, end, valid] in tokens of the response, none without a verdict; `process` is the process reward
    as it entered the response's score, weight included, or null where the response was not judged.
    """
    judged = isinstance(scored.verdict, Verdict)
    validity = scored.verdict.validity if isinstance(scored.verdict, Verdict) else ()
    process = scored.rewards.process
    return json.dumps(
        {
            "correct": scored.rewards.answer > config.advantage.tau,
            "process": None if process is None else config.reward.process_weight * process,
            "steps": [[s.start, s.end, v] for s, v in zip(scored.steps, validity, strict=True)] if judged else [],
        }
    )


def mrpo_advantages(
    token_level_rewards: torch.Tensor,  # (B, T)
    response_mask: torch.Tensor,  # (B, T)
    index: Sequence[Any],
    records: Sequence[str],
    *,
    normalize_by_std: bool = True,
    penalty: str = "exponential",
    round_weights: bool = False,
) -> torch.Tensor:  # (B, T)
    """MRPO's advantage of each response token: compared within its group, then shaped by the verdicts on the steps.

    A response that was not judged gets the mean process reward of its group and no shaping.

    Args:
        token_level_rewards: their sum is the score of a response.
        response_mask: 1 at the response's own tokens; elsewhere the advantage is 0.
        index: the group of each response, such as verl's `uid`.
        records: as `step_record` makes them.
        normalize_by_std: divide by the group's standard deviation.
        penalty, round_weights: as in `mrpo.kernels.step_advantages`.
    """
    facts = [json.loads(record) for record in records]
    scores = token_level_rewards.sum(-1)
    process = scores.new_tensor([float("nan") if fact["process"] is None else fact["process"] for fact in facts])
    plain = torch.empty_like(scores)
    for group in dict.fromkeys(index):
        members = torch.tensor([i for i, key in enumerate(index) if key == group], device=scores.device)
        given = process[members][None]
        missing = torch.where(given.isnan(), fill_unjudged(given), 0.0)
        normalize: Any = "group_std" if normalize_by_std else "group_mean"
        plain[members] = group_advantages(scores[members][None] + missing, normalize=normalize)[0]
    shaped = step_advantages(
        plain,
        torch.tensor([fact["correct"] for fact in facts], device=scores.device),
        *_steps([fact["steps"] for fact in facts], response_mask),
        penalty=penalty,
        round_weights=round_weights,
    )
    return shaped * response_mask


def _steps(
    steps: Sequence[Sequence[tuple[int, int, bool]]], response_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step of each token, validity of each step and number of steps, as `step_advantages` takes them."""
    ids = torch.full(response_mask.shape, -1, dtype=torch.int64)
    valid = torch.zeros(len(steps), max(1, *map(len, steps)), dtype=torch.bool)
    for row, spans in enumerate(steps):
        for k, (start, end, is_valid) in enumerate(spans):
            ids[row, start:end] = k
            valid[row, k] = is_valid
    counts = torch.tensor([len(spans) for spans in steps])
    return ids.to(response_mask.device), valid.to(response_mask.device), counts.to(response_mask.device)


def register(name: str = "mrpo", *, penalty: str = "exponential", round_weights: bool = False) -> None:
    """Registers the estimator in verl, in this process, under `name`. Registering a name twice changes nothing.

    Raises:
        ImportError: verl is not installed.
    """
    try:
        from verl.trainer.ppo import ray_trainer
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est
    except ImportError as error:
        raise ImportError(f"mrpo.integrations.verl.register needs verl 0.9: pip install verl ({error})") from error
    if name in ADV_ESTIMATOR_REGISTRY:
        return

    @register_adv_est(name)
    def estimate(
        token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Sequence[Any], **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        records = _records.get()
        if records is None:
            raise UserError(
                f"adv_estimator={name} found no field {FIELD!r} in the batch. It needs a reward manager that writes it "
                "(mrpo.integrations.verl_rewards) and a trainer that passes on what that says; in verl 0.9 that is "
                "the one of trainer.use_v1=False"
            )
        config = options.get("config") or {}
        advantages = mrpo_advantages(
            token_level_rewards,
            response_mask,
            index,
            records,
            normalize_by_std=config.get("norm_adv_by_std_in_grpo", True),
            penalty=penalty,
            round_weights=round_weights,
        )
        return advantages, advantages

    ray_trainer.compute_advantage = _with_records(ray_trainer.compute_advantage)


def _with_records(compute_advantage: Callable[..., Any]) -> Callable[..., Any]:
    """`compute_advantage` of verl, during which the batch's records can be found."""

    @functools.wraps(compute_advantage)
    def wrapped(data: Any, *args: Any, **kwargs: Any) -> Any:
        fields: Mapping[str, Any] = data.non_tensor_batch
        token = _records.set(list(fields[FIELD]) if FIELD in fields else None)
        try:
            return compute_advantage(data, *args, **kwargs)
        finally:
            _records.reset(token)

    return wrapped
