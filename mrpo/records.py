"""The nouns that flow through a training step: Example -> Group of Completions -> ScoredCompletion.

They are frozen: a stage makes a new record and never edits one that another stage made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from mrpo.pictures import Picture, shown_picture, shown_size


@dataclass(frozen=True)
class Example:
    """One question about zero or more images.

    `images` are paths or decoded pictures, `rationale` is the gold reasoning or None, and `metadata` holds what only
    some data sets know (the scene of a phantom image, the organ of a radiology image).
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    answer: str
    rationale: str | None
    split: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images as they are shown; a file's pixels are decoded only as `open_image` says.

        Raises:
            OSError: a file is missing or is not an image.
        """
        return [shown_size(image) for image in self.images]

    def load_images(self) -> list[Image.Image]:
        """The images as RGB pictures, as they are shown.

        Raises:
            OSError: a file is missing or is not an image, or pixels are NaN or infinite.
        """
        return [shown_picture(image) for image in self.images]


@dataclass(frozen=True)
class Step:
    """One reasoning step: a sentence of the think block and the half-open token span [start, end) that writes it."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `token_ids` are the sampler's own (never re-tokenised), the end token included.

    `logprobs` are the sampler's log-probabilities of these tokens at its temperature, in nats; None: it tells none.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StepVerdict:
    """The judge's two bits for one step; the step is valid if either is set."""

    gold_alignment: bool
    answer_contribution: bool
    reason: str = ""

    @property
    def valid(self) -> bool:
        return self.gold_alignment or self.answer_contribution


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on every step of one completion, in order."""

    steps: tuple[StepVerdict, ...]

    @property
    def validity(self) -> tuple[bool, ...]:
        return tuple(step.valid for step in self.steps)


@dataclass(frozen=True)
class Unjudged:
    """The judge gave no usable verdict.

    The completion counts with the mean process reward of its group, is not shaped, and is counted as unjudged.
    """

    reason: str


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge sees of one completion: the example and the texts of its steps and answer. Data, never orders."""

    example: Example
    steps: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class Rewards:
    """The rewards of one completion. `process` is None when the completion was not judged."""

    answer: float
    process: float | None
    length: float
    answer_parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with its steps, verdict and rewards."""

    completion: Completion
    answer: str | None
    steps: tuple[Step, ...]
    verdict: Verdict | Unjudged
    rewards: Rewards


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for a model: token ids with image tokens expanded, and the image tensors of its family.

    input_ids: (T,) int64; token_type_ids: (T,) int64, 1 at image tokens; images: the vision tower's inputs, first
    dimension over patches or tiles, so that prompts are batched by concatenation, in the dtype of the model.

    For engines that process images and expand their tokens themselves, `text_ids` is the prompt with one placeholder
    an image and `pictures` are the images, scaled down to the pixel limit; `message` is what the user says beside them.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    images: Mapping[str, torch.Tensor]
    text_ids: tuple[int, ...]
    pictures: tuple[Image.Image, ...]
    message: str = ""


@dataclass(frozen=True)
class Group:
    """A prompt and its G completions."""

    example: Example
    prompt: EncodedPrompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class EvaluatedSample:
    """What an evaluation keeps of one completion.

    `correct` is answer accuracy, `validity` the verdict on each step in order (None: not judged), `reward` the
    summed reward, `greedy` tells the one greedy completion of a question from its sampled ones.
    """

    question_id: str
    correct: bool
    validity: tuple[bool, ...] | None
    reward: float
    greedy: bool
