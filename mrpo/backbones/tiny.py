"""Builds a Qwen3-VL of about a million random parameters, with tokenizer and image processor, from nothing.

The folder it writes is an ordinary Hugging Face one: AutoTokenizer, AutoImageProcessor and AutoModelForImageTextToText
load it offline and without torchvision. Sizes fit 64 x 64 pictures: 8 x 8 patches of 8 pixels, merged two by two into
16 image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mrpo.data.phantom import corpus as phantom_corpus

# In the order of Qwen's own vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# One token each but not special: `skip_special_tokens` must leave them in the text.
TAG_TOKENS = ("<thinking>", "</thinking>", "<answer>", "</answer>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Qwen's pre-tokenizer: a word keeps the space before it, digits stand alone.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATCH, _MERGE, _PICTURE = 8, 2, 64
_HIDDEN, _VISION_HIDDEN = 128, 96


def build_tiny(out_dir: Path | str, *, seed: int, corpus: Iterable[str] | None = None) -> int:
    """Writes a random Qwen3-VL, its tokenizer, chat template and image processor to `out_dir`.

    Args:
        out_dir: folder to write; made if missing, files in it are overwritten.
        seed: seed of the weights; equal seeds give equal weights and leave the global random state as it was.
        corpus: texts whose every word becomes one token; default: the phantom language. Other text still encodes,
            byte by byte where need be.

    Returns:
        The number of parameters.
    """
    tokenizer = build_tokenizer(phantom_corpus() if corpus is None else corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(_config(tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    _image_processor().save_pretrained(out_dir)
    return sum(parameter.numel() for parameter in model.parameters())


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every word of `corpus` as one token and any other text by its bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,  # an upper bound: merging stops when every word of the corpus is whole
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus, "user\n", "assistant\n", "system\n"], trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    token_ids = tokenizer.get_vocab()
    return Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": _VISION_HIDDEN,
            "intermediate_size": 2 * _VISION_HIDDEN,
            "num_heads": 3,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": _HIDDEN,
            "num_position_embeddings": (_PICTURE // _PATCH) ** 2,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _image_processor() -> Qwen2VLImageProcessorPil:
    """Keeps pictures between one phantom's area and four times as much: 16 to 64 image tokens."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": _PICTURE**2, "longest_edge": 4 * _PICTURE**2},
        patch_size=_PATCH,
        temporal_patch_size=2,
        merge_size=_MERGE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
