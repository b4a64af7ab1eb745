from __future__ import annotations

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from mrpo.backbones.tiny import TAG_TOKENS, build_tiny
from mrpo.data.phantom import PhantomDataset, corpus
from mrpo.data.targets import sft_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def prompt(tokenizer, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def inputs(folder, tokenizer) -> dict[str, torch.Tensor]:
    examples = PhantomDataset("train", size=2)[:2]
    processor = AutoImageProcessor.from_pretrained(folder)
    images = dict(processor(images=[e.images[0] for e in examples], return_tensors="pt"))
    texts = [prompt(tokenizer, e.question).replace("<|image_pad|>", "<|image_pad|>" * 16) for e in examples]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    kinds = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {**batch, **images, "mm_token_type_ids": kinds}


def test_every_word_of_phantom_is_one_token(tokenizer):
    for example in PhantomDataset("train", size=300, corruption=0.5):
        rationale, answer = sft_target(example)
        for text in (example.question, rationale, answer):
            words = text.replace(".", " .").replace("?", " ?").split()
            assert len(tokenizer(text).input_ids) == len(words), text


@pytest.mark.parametrize(
    "text", ["naïve Lésion 3.5 cm 中文 🩻", "\t tabs\r\n\x00", "<think>x</think> {a: 1}", *corpus()][:20]
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tags_are_single_plain_tokens(tokenizer):
    text = "<thinking>The fat is dark.</thinking><answer>CT</answer>"
    ids = tokenizer(text).input_ids
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if "<" in t] == list(TAG_TOKENS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_prompt_is_qwens(tokenizer):
    assert prompt(tokenizer, "Where are the lesions?") == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where are the lesions?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHm?<|im_end|>\n"
    )


def test_a_phantom_image_becomes_sixteen_image_tokens(folder, tokenizer):
    batch = inputs(folder, tokenizer)
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert batch["pixel_values"].shape == (128, 3 * 2 * 8 * 8)
    assert batch["mm_token_type_ids"].sum(dim=1).tolist() == [16, 16]


def test_the_auto_classes_load_it_and_it_sees_the_image(folder, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) <= 1_300_000
    batch = inputs(folder, tokenizer)
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert logits.shape[2] >= len(tokenizer)
    assert torch.isfinite(logits).all()
    darker = {**batch, "pixel_values": batch["pixel_values"] - 0.5}
    assert (model(**darker).logits - logits).abs().max() > 1e-4
    logits.logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_generation_ends_at_either_end_token(folder, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert set(model.generation_config.eos_token_id) == ends
    batch = inputs(folder, tokenizer)
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= batch["input_ids"].shape[1] + 3


def test_weights_follow_the_seed_and_leave_the_global_state_alone(folder, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build_tiny(tmp_path / "same", seed=0)
    assert torch.equal(torch.rand(1), expected)
    build_tiny(tmp_path / "other", seed=1)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]
    assert (folder / "tokenizer.json").read_text() == (tmp_path / "same" / "tokenizer.json").read_text()
