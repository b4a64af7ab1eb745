"""Hugging Face's own `generate`, as the paper's code calls it: the prompt is repeated for every completion."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from mrpo.backbones import Processor, to_device
from mrpo.records import Completion, EncodedPrompt


def generate(
    model: Any,
    processor: Processor,
    prompt: EncodedPrompt,
    *,
    count: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[Completion]:
    """`count` completions of `prompt`; `temperature` 0 is greedy."""
    torch.manual_seed(seed)
    end = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    ends = end if isinstance(end, list) else [end]
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    inputs = {
        "input_ids": prompt.input_ids[None],
        "attention_mask": torch.ones_like(prompt.input_ids)[None],
        **processor.family.forward_inputs(prompt.token_type_ids[None]),
        **prompt.images,
    }
    training = model.training
    model.eval()
    with torch.no_grad():
        sequences = model.generate(
            **to_device(inputs, model.device, model.dtype),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                num_return_sequences=count,
                eos_token_id=ends,
                pad_token_id=processor.tokenizer.pad_token_id,
                suppress_tokens=list(processor.placeholder_ids),
                **sampled,
            ),
        )
    model.train(training)
    completions = []
    for row in sequences[:, len(prompt.input_ids) :].tolist():
        last = next((i for i, token in enumerate(row) if token in ends), None)
        token_ids = tuple(row if last is None else row[: last + 1])
        completions.append(Completion(token_ids, processor.decode(token_ids), "length" if last is None else "stop"))
    return completions
