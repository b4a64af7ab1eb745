"""What a model family must say about itself, and the processor that turns an example into a prompt.

A family is a small class: its think tag, how its image processor is called, and how many image tokens an image takes.
No torchvision is needed: images go through the PIL image processors, text through the tokenizer's chat template, and
the expansion of image placeholders happens here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image

from mrpo.errors import UserError
from mrpo.kernels.transfer import send
from mrpo.records import EncodedPrompt, Example

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFeatures:
    """What the vision tower says of all images of a batch, in order, one line for each of their n image tokens.

    embeddings: (n, H), in place of token embeddings; deepstack: (n, H) each, added behind the first decoder layers.
    """

    embeddings: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()


class Family(Protocol):
    """One model family. `model_types` are the `model_type`s of its checkpoint configs.

    ragged_vision: whether its vision tower takes the patches of images of all sizes one behind the other.
    max_aspect_ratio: how many times as long as the other a side of an image may be.
    """

    model_types: ClassVar[tuple[str, ...]]
    think_tag: ClassVar[str]
    vision_modules: ClassVar[tuple[str, ...]]
    ragged_vision: ClassVar[bool]
    max_aspect_ratio: ClassVar[float]

    def process_images(
        self, image_processor: Any, images: Sequence[Image.Image], config: Any
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The vision tower's inputs for `images` and the number of image tokens of each."""
        ...

    def count_image_tokens(self, image_processor: Any, width: int, height: int, config: Any) -> int:
        """The number of image tokens of an image of this size."""
        ...

    def processor_options(self, image_processor: Any) -> dict[str, Any]:
        """What transformers' own processor of the family must be told to treat images as `process_images` does."""
        ...

    def placeholder(self, num_tokens: int) -> tuple[str, str]:
        """The text that stands for an image in the chat template, and what it expands to."""
        ...

    def forward_inputs(self, token_type_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further forward arguments made from `token_type_ids` (B, T), 1 at image tokens."""
        ...

    def prompt_positions(self, core: Any, prompt: EncodedPrompt) -> torch.Tensor:
        """(A, T) int64 positions of a prompt's tokens on the A axes of the rotary embedding."""
        ...

    def vision_plan(self, core: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """What the vision tower makes of the sizes of the images of `prompts`, made here on the CPU.

        The tower itself would read sizes back from the device, and wait for it each time.
        """
        ...

    def image_features(self, core: Any, images: Mapping[str, torch.Tensor], plan: Mapping[str, Any]) -> ImageFeatures:
        """The vision tower's word on `images`, made by `process_images` and batched by concatenation.

        `plan`: the `vision_plan` of these images on their device; if it is empty the tower makes its own.
        """
        ...

    def blank_image(self, config: Any) -> tuple[dict[str, torch.Tensor], int]:
        """The vision tower's inputs of the smallest possible image, all zeros, and the number of its image tokens."""
        ...


@dataclass(frozen=True)
class Processor:
    """Family, tokenizer and image processor of one checkpoint: what turns examples into prompts and ids into text.

    image_dtype: what the model computes in. Its vision tower begins with a cast to it, so that a prompt's images are
    kept in it from the start: in bfloat16 half the bytes to keep and to send.
    """

    family: Family
    tokenizer: Any
    image_processor: Any
    model_config: Any
    think_tag: str
    instruction: str
    max_prompt_tokens: int
    max_image_pixels: int
    image_dtype: torch.dtype

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand for image or video content and must not occur in a completion."""
        names = ("image_token_id", "video_token_id")
        return tuple(i for name in names if (i := getattr(self.model_config, name, None)) is not None)

    def encode_prompt(self, example: Example) -> EncodedPrompt:
        """The chat prompt of `example`, ready for generation.

        Raises:
            UserError: the prompt is longer than `prompt.max_tokens`, or an image cannot be read, or is too long and
                thin for the family.
        """
        images = _readable(example, Example.load_images)
        self._check_shapes(example, [image.size for image in images])
        pictures = tuple(shrink(image, self.max_image_pixels) for image in images)
        tensors, counts = self.family.process_images(self.image_processor, pictures, self.model_config)
        text_ids, token_ids = self._token_ids(example, counts)
        input_ids = torch.tensor(token_ids)
        token_type_ids = (input_ids == self.model_config.image_token_id).long()
        kept = to_device(tensors, torch.device("cpu"), self.image_dtype)
        return EncodedPrompt(input_ids, token_type_ids, kept, text_ids, pictures, self._message(example.question))

    def count_prompt_tokens(self, example: Example) -> int:
        """The length of `encode_prompt(example).input_ids`, from the sizes of the images without decoding a pixel.

        Raises:
            UserError: as `encode_prompt`, but for images that turn out broken after their header.
        """
        shown_sizes = _readable(example, Example.image_sizes)
        self._check_shapes(example, shown_sizes)
        sizes = [shrunk_size(size, self.max_image_pixels) for size in shown_sizes]
        counts = [self.family.count_image_tokens(self.image_processor, *size, self.model_config) for size in sizes]
        return len(self._token_ids(example, counts)[1])

    def encode_target(self, rationale: str, answer: str) -> tuple[int, ...]:
        """Token ids of the completion that SFT teaches: think block, answer, end token.

        Raises:
            UserError: the text contains an image placeholder.
        """
        tag = self.think_tag
        text = f"<{tag}>{rationale}</{tag}><answer>{answer}</answer>"
        token_ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if set(token_ids) & set(self.placeholder_ids):
            raise UserError(f"a target for sft contains an image placeholder: {text!r}")
        return (*token_ids, self.tokenizer.eos_token_id)

    def blank_prompt(self, *, image: bool) -> EncodedPrompt:
        """The shortest prompt, for a pass that must be run but has nothing to say; with a blank image if asked."""
        tensors, count = self.family.blank_image(self.model_config) if image else ({}, 0)
        input_ids = torch.tensor([self.model_config.image_token_id] * count + [self.tokenizer.pad_token_id])
        return EncodedPrompt(input_ids, (torch.arange(count + 1) < count).long(), tensors, (), ())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _check_shapes(self, example: Example, sizes: Sequence[tuple[int, int]]) -> None:
        limit = self.family.max_aspect_ratio
        for size in sizes:
            shrunk = shrunk_size(size, self.max_image_pixels)
            if max(shrunk) > limit * min(shrunk):
                scaled = "" if shrunk == size else f", scaled to {shrunk[0]} x {shrunk[1]},"
                raise UserError(
                    f"example {example.id}: its image of {size[0]} x {size[1]} pixels{scaled} is too long and thin: "
                    f"{self.model_config.model_type} takes sides of at most {limit:g} : 1; crop or pad it"
                )

    def _token_ids(self, example: Example, counts: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
        """The prompt's ids with one placeholder an image, and with each image's `counts` tokens."""
        text = self._chat_text(example.question, len(counts))
        first, *others = text.split(self.family.placeholder(1)[0], len(counts))
        images = (self.family.placeholder(count)[1] for count in counts)
        # A template that leaves images out is told of below.
        expanded_text = first + "".join(image + other for image, other in zip(images, others, strict=False))
        text_ids, token_ids = self.tokenizer([text, expanded_text], add_special_tokens=False).input_ids
        if len(token_ids) > self.max_prompt_tokens:
            raise UserError(
                f"example {example.id}: its prompt takes {len(token_ids)} tokens, above prompt.max_tokens="
                f"{self.max_prompt_tokens}; raise that, or lower data.max_image_pixels={self.max_image_pixels}"
            )
        num_image_tokens = token_ids.count(self.model_config.image_token_id)
        if num_image_tokens != sum(counts):
            raise UserError(
                f"example {example.id}: its text contains the image placeholder of {self.model_config.model_type}, "
                f"so {num_image_tokens} image tokens stand where {sum(counts)} belong"
            )
        return tuple(text_ids), token_ids

    def _message(self, question: str) -> str:
        return f"{question}\n{self.instruction}" if self.instruction else question

    def _chat_text(self, question: str, num_images: int) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": self._message(question)}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """`image` scaled down to at most `max_pixels`, its shape kept; smaller images are returned as they are."""
    size = shrunk_size(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(width, height) of `shrink`'s result for an image of `size`."""
    width, height = size
    if width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`tensors` on `device`, floating point ones in `dtype`."""
    return {k: send(v, device, dtype if v.is_floating_point() else None) for k, v in tensors.items()}


def batch_images(prompts: Sequence[EncodedPrompt], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The image tensors of several prompts as one batch on `device`, in order, floating point ones in `dtype`.

    They are joined there: here that would be one more copy of megabytes before the device can begin.
    """
    sent = [to_device(prompt.images, device, dtype) for prompt in prompts]
    names = sorted({name for images in sent for name in images})
    return {name: torch.cat([images[name] for images in sent if name in images]) for name in names}


def _readable(example: Example, read: Callable[[Example], list[T]]) -> list[T]:
    try:
        return read(example)
    except OSError as error:
        raise UserError(f"example {example.id}: its image cannot be read: {error}") from error
