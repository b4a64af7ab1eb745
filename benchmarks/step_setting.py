"""What a whole step is measured with: the names of the ways, and one setting, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass

OURS, AHEAD, TRL, REFERENCE = "ours", "ours, one step ahead", "TRL", "reference's way"
GRPO, MRPO = "GRPO", "MRPO"

# Learning rate of every way: no weight moves, so that every step has the same work.
FROZEN = 1e-30
# Completions that the others put into a pass: TRL's default, and the paper's.
MICRO_BATCH, REFERENCE_MICRO_BATCH = 8, 2
LORA_RANK = 16


@dataclass(frozen=True)
class Setting:
    """P prompts a step, G completions of T tokens each, images of so many tokens, and the judge that all ask.

    judge: URL of the server, or "" for the judge in the process. rounds: the reference's way is measured on its first
    so many micro-batches, 0: all.
    """

    model: str
    prompts: int
    group: int
    image_tokens: int
    length: int
    processes: int = 1
    lora: bool = False
    judge: str = ""
    rounds: int = 0

    @property
    def samples(self) -> int:
        return self.prompts * self.group
