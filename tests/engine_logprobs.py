"""What an engine says of the tokens it drew, against the model's own full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mrpo.backbones import Processor
from mrpo.records import Completion, EncodedPrompt


def policy_logits(model: Any, processor: Processor, prompt: EncodedPrompt, token_ids: Sequence[int]) -> torch.Tensor:
    """(T, V) float32 logits that predict `token_ids` after `prompt`; placeholders are impossible."""
    ids = torch.cat([prompt.input_ids, torch.tensor(token_ids)])[None]
    types = torch.cat([prompt.token_type_ids, torch.zeros(len(token_ids), dtype=torch.long)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.images}
    logits = model(**inputs, **processor.family.forward_inputs(types)).logits[0, len(prompt.input_ids) - 1 : -1].float()
    return logits.index_fill(1, torch.tensor(processor.placeholder_ids), -torch.inf)


@torch.no_grad()
def difference(
    model: Any, processor: Processor, prompt: EncodedPrompt, completion: Completion, temperature: float
) -> float:
    """The largest |Δ log p| between the sampler and `model` over the tokens of one completion."""
    assert completion.logprobs is not None
    logprobs = (policy_logits(model, processor, prompt, completion.token_ids) / temperature).log_softmax(dim=-1)
    found = logprobs.gather(1, torch.tensor([completion.token_ids]).T)[:, 0]
    return (found - torch.tensor(completion.logprobs)).abs().max().item()


def largest_difference(
    model: Any,
    processor: Processor,
    prompts: Sequence[EncodedPrompt],
    groups: Sequence[Sequence[Completion]],
    temperature: float,
) -> float:
    """The same over all completions of all prompts."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    return max(difference(model, processor, prompt, completion, temperature) for prompt, completion in pairs)
