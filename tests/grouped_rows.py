"""Groups of completions for tests of the update: ragged, behind prompts with one image, several, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from mrpo.backbones import Processor
from mrpo.batching import Row
from mrpo.records import Example


@dataclass(frozen=True)
class GroupPlan:
    """(width, height) of the images, words of the question, number of completions."""

    images: tuple[tuple[int, int], ...]
    words: int
    completions: int


MIXED = (
    GroupPlan(images=((64, 48),), words=3, completions=8),
    GroupPlan(images=(), words=9, completions=3),
    GroupPlan(images=((40, 88), (56, 56)), words=1, completions=4),
    GroupPlan(images=((96, 32),), words=6, completions=1),
    GroupPlan(images=((32, 32),), words=2, completions=5),
)
WORDS = ["where", "is", "the", "left", "lung", "no", "effusion", "?", "heart"]


def make_groups(
    processor: Processor, plans: Sequence[GroupPlan] = MIXED, *, longest: int = 12, seed: int = 0
) -> list[list[Row]]:
    """A list of rows for each plan. Completions are random tokens, 1 to `longest`; weights differ from row to row.

    One completion of the first group has advantage 0 and one of the second weight 0.
    """
    generator = torch.Generator().manual_seed(seed)
    words = [token for word in WORDS for token in processor.tokenizer(f" {word}", add_special_tokens=False).input_ids]
    groups = []
    for number, plan in enumerate(plans):
        noise = np.random.default_rng([seed, number])
        images = tuple(Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in plan.images)
        question = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(plan.words))
        prompt = processor.encode_prompt(Example(f"{number}", images, question, "yes", None, "train"))
        rows = []
        for _ in range(plan.completions):
            length = int(torch.randint(1, longest + 1, (), generator=generator))
            chosen = torch.randint(len(words), (length,), generator=generator)
            rows.append(
                Row(
                    prompt,
                    tuple(words[i] for i in chosen),
                    advantages=torch.randn(length, generator=generator),
                    weights=torch.rand(length, generator=generator) / 50,
                )
            )
        groups.append(rows)
    groups[0][0] = replace(groups[0][0], advantages=torch.zeros_like(groups[0][0].advantages))
    groups[1][0] = replace(groups[1][0], weights=torch.zeros_like(groups[1][0].weights))
    return groups


def with_old_and_reference(rows: Sequence[Row], logprobs: Sequence[torch.Tensor], *, seed: int = 0) -> list[Row]:
    """`rows` with old, reference and sampler log-probabilities around the policy's `logprobs`: ratios on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def near(values: torch.Tensor) -> torch.Tensor:
        return (values + 0.3 * torch.randn(len(values), generator=generator)).float()

    return [
        replace(row, old_logprobs=near(values), ref_logprobs=near(values), sampler_logprobs=near(values))
        for row, values in zip(rows, logprobs, strict=True)
    ]


@torch.no_grad()
def randomize_adapters(model: torch.nn.Module) -> None:
    """Adapters start at 0, where half of them has no gradient, and the reference is the policy."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0.0, 0.1, generator=generator)
