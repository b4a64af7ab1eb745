"""The three rewards of a completion: its answer, its reasoning steps and their number."""

from __future__ import annotations

from mrpo.records import Rewards
from mrpo.rewards.answer import AnswerReward, AnswerScore
from mrpo.rewards.length import length_reward
from mrpo.rewards.process import process_reward

__all__ = ["AnswerReward", "AnswerScore", "Rewards", "length_reward", "process_reward"]
