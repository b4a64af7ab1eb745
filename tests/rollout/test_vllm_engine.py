"""The vLLM engine against the Hugging Face one and the model's own probabilities. Runs on a CPU build of vLLM too."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.errors import UserError
from mrpo.records import EncodedPrompt, Example
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine
from mrpo.rollout.vllm_engine import VLLMEngine

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

CONFIG = Config.model_validate({"model": {"path": "phantom"}})
MAX_TOKENS = 100


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(CONFIG)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CONFIG.model)


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[EncodedPrompt]:
    return [processor.encode_prompt(example) for example in PhantomDataset("test", size=40)]


@pytest.fixture(scope="module")
def engine(processor: Processor) -> Iterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield VLLMEngine(
            CONFIG.model,
            processor,
            max_tokens=MAX_TOKENS,
            max_images=2,
            max_concurrent=64,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
        )


@needs_vllm
def test_greedy_completions_are_those_of_hugging_face(
    engine: VLLMEngine, model: Any, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    reference = HFEngine(model, processor, batch_size=64, weights=nullcontext)
    params = SamplingParams(1, MAX_TOKENS, 0.0)
    assert engine.generate(prompts, params) == reference.generate(prompts, params)


@needs_vllm
def test_samples_depend_on_their_seed_alone(engine: VLLMEngine, prompts: list[EncodedPrompt]) -> None:
    seeds = (1, 10_000, 20_000)  # vLLM counts on from each
    together = engine.generate(prompts[:3], SamplingParams(4, 20, 2.0, seeds))
    alone = engine.generate(prompts[1:2], SamplingParams(4, 20, 2.0, seeds[1:2]))
    assert together[1] == alone[0]
    assert len({completion.token_ids for group in together for completion in group}) == 12


@needs_vllm
def test_samples_follow_the_tempered_softmax(
    engine: VLLMEngine, model: Any, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    count, temperature = 2000, 2.0
    begun = tuple(processor.tokenizer("<thinking>The image is").input_ids)  # two ways to go on
    prompt = replace(
        prompts[0],
        input_ids=torch.cat([prompts[0].input_ids, torch.tensor(begun)]),
        token_type_ids=torch.cat([prompts[0].token_type_ids, torch.zeros(len(begun), dtype=torch.long)]),
        text_ids=prompts[0].text_ids + begun,
    )
    (drawn,) = engine.generate([prompt], SamplingParams(count, 1, temperature, seeds=(5,)))
    row = Row(prompt, (0,), torch.zeros(1), torch.zeros(1))
    batch = collate([row], processor, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.predicting][0]
    logits[list(processor.placeholder_ids)] = -torch.inf
    expected = torch.softmax(logits / temperature, dim=-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(expected)) / count
    top = expected.topk(30)
    assert top.values[1] > 0.2
    for chosen in (top.indices[:1], top.indices[1:2], top.indices):
        share = expected[chosen].sum()
        assert (counts[chosen].sum() - share).abs() < 4 * (share * (1 - share) / count).sqrt()


@needs_vllm
def test_a_completion_is_cut_or_ends_with_its_end_token(
    engine: VLLMEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    ((cut,),) = engine.generate(prompts[:1], SamplingParams(1, 5, 0.0))
    assert (len(cut.token_ids), cut.finish_reason) == (5, "length")
    ((whole,),) = engine.generate(prompts[:1], SamplingParams(1, MAX_TOKENS, 0.0))
    assert (whole.token_ids[-1], whole.finish_reason) == (processor.tokenizer.eos_token_id, "stop")
    assert whole.token_ids[:5] == cut.token_ids
    assert whole.text == processor.decode(whole.token_ids)


@needs_vllm
@pytest.mark.parametrize("sizes", [[], [(100, 50)], [(64, 200), (300, 90)], [(1000, 1200)]])
def test_images_of_any_size_and_number_take_the_same_tokens(
    engine: VLLMEngine, processor: Processor, sizes: list[tuple[int, int]]
) -> None:
    pictures = tuple(Image.new("RGB", size, (90, 30, 60)) for size in sizes)
    prompt = processor.encode_prompt(Example("x", pictures, "Which organ?", "", None, "test"))
    engine.generate([prompt], SamplingParams(1, 1, 0.0))  # compares the expanded prompts itself
    with pytest.raises(RuntimeError, match="image processor"):
        engine.generate([replace(prompt, input_ids=prompt.input_ids[1:])], SamplingParams(1, 1, 0.0))


def test_without_vllm_the_error_says_how_to_install_it(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install mrpo\[vllm\]"):
        VLLMEngine(CONFIG.model, processor, max_tokens=8, max_images=1, max_concurrent=1)
