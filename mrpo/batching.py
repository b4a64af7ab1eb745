"""Prompts and completions as padded rows: one row [prompt, completion] per completion (the dense form).

Only the hidden states that predict a completion token reach the head, as one flat list of N tokens in row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mrpo.backbones import Processor, batch_images, to_device
from mrpo.records import EncodedPrompt


@dataclass(frozen=True)
class Row:
    """A prompt with one completion and the loss inputs of its T tokens.

    advantages, weights: (T,) float32; old_logprobs, ref_logprobs: (T,) float32 or None.
    """

    prompt: EncodedPrompt
    token_ids: tuple[int, ...]
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything in this row as tensors by name, to be saved without pickled classes."""
        own = {
            "token_ids": torch.tensor(self.token_ids),
            "advantages": self.advantages,
            "weights": self.weights,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "prompt_ids": self.prompt.input_ids,
        }
        return {name: tensor for name, tensor in own.items() if tensor is not None} | dict(self.prompt.images)


@dataclass(frozen=True)
class DenseBatch:
    """Model inputs for B rows of at most L tokens with N completion tokens.

    inputs: what the model's forward takes, input_ids and attention_mask (B, L) among them;
    predicting: (N,) index into the B * L hidden states; targets: (N,) token ids;
    advantages, weights, old_logprobs, ref_logprobs: (N,) float32, the latter two or None.
    """

    inputs: dict[str, torch.Tensor]
    predicting: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None


def collate(rows: Sequence[Row], processor: Processor, device: torch.device, dtype: torch.dtype) -> DenseBatch:
    """Pads `rows` on the right and puts them on `device`; images in `dtype`."""
    length = max(len(row.prompt.input_ids) + len(row.token_ids) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, processor.tokenizer.pad_token_id)
    mask, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    predicting = []
    for i, row in enumerate(rows):
        start = len(row.prompt.input_ids)
        end = start + len(row.token_ids)
        input_ids[i, :start] = row.prompt.input_ids
        input_ids[i, start:end] = torch.tensor(row.token_ids)
        mask[i, :end] = 1
        types[i, :start] = row.prompt.token_type_ids
        predicting.append(i * length + torch.arange(start - 1, end - 1))
    inputs = {"input_ids": input_ids, "attention_mask": mask, **batch_images([row.prompt for row in rows])}
    inputs |= processor.family.forward_inputs(types)
    return DenseBatch(
        inputs=to_device(inputs, device, dtype),
        predicting=torch.cat(predicting).to(device),
        targets=torch.tensor([t for row in rows for t in row.token_ids], device=device),
        advantages=torch.cat([row.advantages for row in rows]).to(device),
        weights=torch.cat([row.weights for row in rows]).to(device),
        old_logprobs=_flat([row.old_logprobs for row in rows], device),
        ref_logprobs=_flat([row.ref_logprobs for row in rows], device),
    )


def _flat(parts: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present).to(device) if present else None
