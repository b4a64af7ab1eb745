"""Completions as model inputs: dense, one padded row [prompt, completion] each, or packed behind a shared prompt.

Only the hidden states that predict a completion token reach the head, as one flat list of N tokens in row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from mrpo.backbones import Processor, batch_images, to_device
from mrpo.backbones.packed import PackedRow
from mrpo.kernels.prefix_attention import PrefixLayout
from mrpo.kernels.transfer import send
from mrpo.records import EncodedPrompt


@dataclass(frozen=True)
class Row:
    """A prompt with one completion and the loss inputs of its T tokens. Rows of one group share their prompt.

    advantages, weights: (T,) float32; old_logprobs, ref_logprobs, sampler_logprobs: (T,) float32 or None. The sampler's
    are those of the engine that wrote the completion, if it told them.
    """

    prompt: EncodedPrompt
    token_ids: tuple[int, ...]
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampler_logprobs: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything in this row as tensors by name, to be saved without pickled classes."""
        own = {
            "token_ids": torch.tensor(self.token_ids),
            "advantages": self.advantages,
            "weights": self.weights,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "sampler_logprobs": self.sampler_logprobs,
            "prompt_ids": self.prompt.input_ids,
        }
        return {name: tensor for name, tensor in own.items() if tensor is not None} | dict(self.prompt.images)

    def portable(self) -> Row:
        """The same for another process: without pictures, and with tensors that are no views of larger ones."""
        values = {name: getattr(self, name) for name in _LOSS_INPUTS}
        copies = {name: value.clone() for name, value in values.items() if value is not None}
        return replace(self, prompt=replace(self.prompt, pictures=()), **copies)


_LOSS_INPUTS = ("advantages", "weights", "old_logprobs", "ref_logprobs", "sampler_logprobs")


@dataclass(frozen=True)
class Tokens:
    """The N completion tokens of a batch.

    predicting: (N,) index into the batch's hidden states; targets: (N,) token ids;
    advantages, weights, old_logprobs, ref_logprobs, sampler_logprobs: (N,) float32, the latter three or None.
    """

    predicting: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    sampler_logprobs: torch.Tensor | None


@dataclass(frozen=True)
class DenseBatch(Tokens):
    """B rows of at most L tokens. `inputs`: what the model's forward takes, input_ids and attention_mask (B, L) etc."""

    inputs: dict[str, torch.Tensor]

    @property
    def size(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.inputs["input_ids"].numel()


@dataclass(frozen=True)
class PackedBatch(Tokens):
    """One packed row."""

    row: PackedRow

    @property
    def size(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.row.input_ids.numel()


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
    inputs = {"input_ids": input_ids, "attention_mask": mask, **processor.family.forward_inputs(types)}
    images = batch_images([row.prompt for row in rows], device, dtype)
    return DenseBatch(**_tokens(rows, predicting, device), inputs=to_device(inputs, device, dtype) | images)


def pack(
    rows: Sequence[Row], processor: Processor, core: Any, device: torch.device, dtype: torch.dtype, *, multiple: int = 1
) -> PackedBatch:
    """One packed row of `rows`, padded to a `multiple` of tokens; images in `dtype`.

    Neighbours of one prompt share it; the last token of a prompt predicts the first token of all of them. Positions of
    a completion begin behind the largest of its prompt, which an image makes smaller than the prompt's length.

    Args:
        core: the `model` of the Hugging Face vision-language model, which knows its positions.
    """
    groups = [list(group) for _, group in groupby(rows, key=lambda row: id(row.prompt))]
    input_ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    image_places, predicting = [], []
    place = 0
    for group in groups:
        prompt = group[0].prompt
        input_ids.append(prompt.input_ids)
        positions.append(processor.family.prompt_positions(core, prompt))
        first = int(positions[-1].max()) + 1
        image_places.append(place + prompt.token_type_ids.nonzero()[:, 0])
        place += len(prompt.input_ids)
        last = place - 1
        for completion in group:
            length = len(completion.token_ids)
            input_ids.append(torch.tensor(completion.token_ids))
            positions.append((first + torch.arange(length)).expand(len(positions[-1]), -1))
            predicting.append(torch.cat([torch.tensor([last]), torch.arange(place, place + length - 1)]))
            place += length
    padding = -place % multiple
    sizes = [(len(group[0].prompt.input_ids), [len(row.token_ids) for row in group]) for group in groups]
    prompts = [group[0].prompt for group in groups]
    images = batch_images(prompts, device, dtype)
    plan = processor.family.vision_plan(core, prompts) if images else {}
    row = PackedRow(
        input_ids=send(torch.cat([*input_ids, torch.zeros(padding, dtype=torch.long)])[None], device),
        position_ids=send(torch.nn.functional.pad(torch.cat(positions, dim=1), (0, padding))[:, None], device),
        layout=PrefixLayout.make(sizes, place + padding, device),
        images=images,
        vision_plan={k: send(v, device) if isinstance(v, torch.Tensor) else v for k, v in plan.items()},
        image_places=send(torch.cat(image_places), device),
    )
    return PackedBatch(**_tokens(rows, predicting, device), row=row)


def _tokens(rows: Sequence[Row], predicting: Sequence[torch.Tensor], device: torch.device) -> dict[str, Any]:
    """The fields of `Tokens`. Of old, reference and sampler log-probabilities all rows have some, or none does."""
    flat: dict[str, torch.Tensor | None] = {
        "predicting": torch.cat(list(predicting)),
        "targets": torch.tensor([token for row in rows for token in row.token_ids]),
    }
    for name in _LOSS_INPUTS:
        present = [value for row in rows if (value := getattr(row, name)) is not None]
        flat[name] = torch.cat(present) if present else None
    return {name: None if value is None else send(value, device) for name, value in flat.items()}
