"""What the tests of TRL train: the shipped vision-language policy, and a tiny text model with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin, Qwen3Config, Qwen3ForCausalLM

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset

CONFIG = Config()


class PictureProcessor(ProcessorMixin):
    """The shipped policy's tokenizer and image processor in one, as TRL wants them.

    Transformers' own processor of the family needs torchvision. This one knows what TRL asks of it: batched chat
    templates, and texts with their images.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._family = load_processor(CONFIG).family
        self._model_config = load_processor(CONFIG).model_config

    def __call__(
        self, images: Any = None, text: Sequence[str] | str = (), padding: bool = False, **kwargs: Any
    ) -> BatchFeature:
        flat = [picture for pictures in images or () for picture in pictures or ()]
        tensors: dict[str, Any] = {}
        if flat:
            tensors, counts = self._family.process_images(self.image_processor, flat, self._model_config)
            marks = iter(counts)
            text = ["<|image_pad|>".join(_interleave(part.split("<|image_pad|>"), marks)) for part in text]
        tokens = self.tokenizer(list(text), add_special_tokens=False, padding=padding)
        ids = tokens["input_ids"]
        types = [[int(token == self._model_config.image_token_id) for token in row] for row in ids]
        columns = {"input_ids": ids, "attention_mask": tokens["attention_mask"], "mm_token_type_ids": types}
        if kwargs.get("return_tensors") == "pt":
            columns = {name: torch.tensor(rows) for name, rows in columns.items()}
        return BatchFeature({**columns, **tensors})

    def apply_chat_template(self, conversation: Any, chat_template: Any = None, **kwargs: Any) -> Any:
        single = isinstance(conversation[0], dict)
        texts = [
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in ([conversation] if single else conversation)
        ]
        if not kwargs.get("tokenize"):
            return texts[0] if single else texts
        images = [
            [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
            for messages in conversation
        ]
        return self(images=images, text=texts)


def _interleave(pieces: list[str], counts: Any) -> list[str]:
    """`pieces` of a text between images, so that joining them with one image token gives each image its count."""
    repeated = [pieces[0]]
    for piece in pieces[1:]:
        repeated += [""] * (next(counts) - 1) + [piece]
    return repeated


def examples(size: int = 4) -> PhantomDataset:
    return PhantomDataset("train", size=size)


def vision_policy() -> tuple[Any, PictureProcessor]:
    """The shipped policy in fp32, and its processor."""
    own: Processor = load_processor(CONFIG)
    own.tokenizer.padding_side = "left"
    return load_model(CONFIG.model), PictureProcessor(own.image_processor, own.tokenizer, own.tokenizer.chat_template)


def text_policy() -> tuple[Any, Any]:
    """A random Qwen3 of 0.2 M parameters and a tokenizer."""
    tokenizer = load_processor(CONFIG).tokenizer
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=576,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer
