"""Whether what a way sampled is what the trainer's weights would sample: a plain forward pass is the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mrpo.backbones import Processor, to_device
from mrpo.records import Completion, EncodedPrompt

# How far the weights are moved to see whether a way follows them, relative to their size.
_NOISE = 0.3

# What the checks find, as it is told: mean |Δ log p| of samples, and what a greedy token misses of the largest logit.
ERROR, GREEDY_ERROR = "off by, log p", "off by, greedy logit"
# The first after a sync of moved weights, against those, and against the ones before.
SYNCED, STALE = "off by, log p, synced", "off by, log p, not synced"

Groups = Sequence[Sequence[Completion]]


@torch.no_grad()
def logits(model: Any, processor: Processor, prompt: EncodedPrompt, token_ids: Sequence[int]) -> torch.Tensor:
    """(T, V) float32 logits that predict `token_ids` after `prompt`; placeholders are impossible."""
    ids = torch.cat([prompt.input_ids, torch.tensor(token_ids)])[None]
    types = torch.cat([prompt.token_type_ids, torch.zeros(len(token_ids), dtype=torch.long)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.images}
    inputs |= processor.family.forward_inputs(types)
    found = model(**to_device(inputs, model.device, model.dtype), logits_to_keep=len(token_ids) + 1, use_cache=False)
    never = torch.tensor(processor.placeholder_ids, device=model.device)
    return found.logits[0, :-1].float().index_fill(1, never, -torch.inf)


def logprob_error(model: Any, processor: Processor, prompts: Sequence[EncodedPrompt], groups: Groups) -> float | None:
    """Mean |Δ log p| over the tokens of all completions, sampled at temperature 1; None if the way tells none."""
    differences = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            if completion.logprobs is None:
                return None
            logprobs = logits(model, processor, prompt, completion.token_ids).log_softmax(dim=-1)
            chosen = torch.tensor(completion.token_ids, device=logprobs.device)[:, None]
            differences.append(logprobs.gather(1, chosen)[:, 0].cpu() - torch.tensor(completion.logprobs))
    return torch.cat(differences).abs().mean().item()


def greedy_error(model: Any, processor: Processor, prompts: Sequence[EncodedPrompt], groups: Groups) -> float:
    """How far below the largest logit a token of greedy completions lies at worst."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            found = logits(model, processor, prompt, completion.token_ids)
            chosen = found.gather(1, torch.tensor(completion.token_ids, device=found.device)[:, None])[:, 0]
            worst = max(worst, (found.amax(dim=-1) - chosen).max().item())
    return worst


@torch.no_grad()
def move(model: Any) -> list[torch.Tensor]:
    """Adds noise to every parameter, and returns what they were."""
    generator = torch.Generator(model.device).manual_seed(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        parameter.add_(noise * (_NOISE * parameter.float().square().mean().sqrt()).to(parameter.dtype))
    return before


@torch.no_grad()
def move_back(model: Any, before: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.copy_(value)
