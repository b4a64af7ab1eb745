"""The vLLM engine against the Hugging Face one and the model's own probabilities. Runs on a CPU build of vLLM too."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_logprobs import largest_difference, policy_logits
from image_cases import write_turned
from PIL import Image

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt, Example
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine
from mrpo.rollout.vllm_engine import READER, VLLMEngine, environment
from mrpo.weights import checkpoint_weights

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
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
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


def _continued(prompt: EncodedPrompt, processor: Processor, text: str) -> EncodedPrompt:
    begun = tuple(processor.tokenizer(text).input_ids)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, torch.tensor(begun)]),
        token_type_ids=torch.cat([prompt.token_type_ids, torch.zeros(len(begun), dtype=torch.long)]),
        text_ids=prompt.text_ids + begun,
    )


@pytest.mark.parametrize(("on_gpu", "more"), [(True, set()), (False, {"VLLM_CPU_OMP_THREADS_BIND"})])
def test_a_launched_engine_needs_more_on_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, more: set[str]
) -> None:
    """On a GPU a variable that one engine has and another has not costs minutes: vLLM compiles anew."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    found = environment(launched=True).keys() - environment(launched=False).keys()
    assert found - {"VLLM_CPU_KVCACHE_SPACE"} == more


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
    assert len({completion.token_ids for group in together for completion in group}) > 3


@needs_vllm
def test_more_prompts_than_are_read_at_once(
    engine: VLLMEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    long = [_continued(prompt, processor, "The image is " * 60) for prompt in prompts]
    limit = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert sum(len(prompt.input_ids) for prompt in long) > limit
    seeds = tuple(10_000 * number for number in range(len(long)))
    together = engine.generate(long, SamplingParams(1, 8, 1.0, seeds))
    assert together[-1:] == engine.generate(long[-1:], SamplingParams(1, 8, 1.0, seeds[-1:]))


@needs_vllm
def test_samples_follow_the_tempered_softmax(
    engine: VLLMEngine, model: Any, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    count, temperature = 2000, 2.0
    prompt = _continued(prompts[0], processor, "<thinking>The image is")  # two ways to go on
    (drawn,) = engine.generate([prompt], SamplingParams(count, 1, temperature, seeds=(5,)))
    with torch.no_grad():
        (logits,) = policy_logits(model, processor, prompt, [0])
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
def test_each_completion_is_told_of_as_it_ends(engine: VLLMEngine, prompts: list[EncodedPrompt]) -> None:
    told: list[tuple[int, int, Completion]] = []
    groups = engine.generate(prompts[:4], SamplingParams(8, 60, 1.5, (1, 2, 3, 4)), lambda *what: told.append(what))
    in_order = [(i, j, completion) for i, group in enumerate(groups) for j, completion in enumerate(group)]
    assert sorted(told, key=lambda what: what[:2]) == in_order
    # All 32 are under way at once, and each takes one token a step.
    lengths = [len(completion.token_ids) for _, _, completion in told]
    assert lengths == sorted(lengths)
    assert [what[:2] for what in told] != [what[:2] for what in in_order]


@needs_vllm
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VLLMEngine, model: Any, processor: Processor, prompts: list[EncodedPrompt], temperature: float
) -> None:
    groups = engine.generate(prompts[:6], SamplingParams(4, 60, temperature, tuple(range(0, 600, 100))))
    assert all(len(c.logprobs or ()) == len(c.token_ids) for group in groups for c in group)
    assert largest_difference(model, processor, prompts[:6], groups, temperature) < 2e-5
    assert largest_difference(model, processor, prompts[:6], groups, temperature * 1.1) > 1e-2


@needs_vllm
def test_sampler_and_trainer_see_a_turned_image_alike(
    engine: VLLMEngine, model: Any, processor: Processor, tmp_path: Path
) -> None:
    examples = []
    for example in PhantomDataset("test", size=6):
        (picture,) = example.load_images()
        file = write_turned(tmp_path / f"{len(examples)}.png", np.asarray(picture), 6)
        # One is decoded from its file, one is in memory and still has its metadata.
        examples += [replace(example, images=(file,)), replace(example, images=(Image.open(file),))]
    prompts = [processor.encode_prompt(example) for example in examples]
    groups = engine.generate(prompts, SamplingParams(2, 40, 1.0, tuple(range(0, 1200, 100))))
    assert largest_difference(model, processor, prompts, groups, 1.0) < 2e-5


@needs_vllm
def test_no_cache_outlives_a_sync(
    engine: VLLMEngine,
    model: Any,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Long enough to fill blocks of the prefix cache, which begin with the image.
    examples = [replace(example, question=example.question * 40) for example in PhantomDataset("test", size=2)]
    prompts = [processor.encode_prompt(example) for example in examples]

    def mismatch(seed: int) -> float:
        groups = engine.generate(prompts, SamplingParams(2, 40, 1.0, (seed, seed + 100)))
        return largest_difference(model, processor, prompts, groups, 1.0)

    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)

    def train(part: str) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter += 0.03 * torch.randn(parameter.shape, generator=generator)

    try:
        assert mismatch(0) < 2e-5
        train("")
        assert mismatch(1) > 1e-2  # not yet brought over
        engine.sync(lambda: checkpoint_weights(model, zero_stage=0))
        assert mismatch(2) < 2e-5
        # The vision tower alone: what goes stale are image features, and the prompts' keys and values made of them.
        train("visual")
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
            engine.sync(lambda: checkpoint_weights(model, zero_stage=0))
            assert mismatch(3) > 1e-3
        engine.sync(lambda: checkpoint_weights(model, zero_stage=0))
        assert mismatch(4) < 2e-5
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        engine.sync(lambda: checkpoint_weights(model, zero_stage=0))


@needs_vllm
def test_an_error_leaves_nothing_under_way(engine: VLLMEngine, prompts: list[EncodedPrompt]) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        engine.generate(prompts[:2], SamplingParams(4, 60, 1.0, (1, 2)), stop)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate(prompts[:1], SamplingParams(2, 8, 1.0, (1,)))[0]) == 2


class HalfAwake:
    """What vLLM 0.24 does: an engine that is partly asleep cannot fall asleep."""

    def __init__(self) -> None:
        self.asleep = {"kv_cache"}

    def sleep(self, level: int) -> None:
        if not self.asleep:
            self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.asleep -= set(tags)


def test_an_engine_that_a_sync_has_half_woken_falls_asleep() -> None:
    engine: Any = object.__new__(VLLMEngine)
    engine.llm, engine._asleep, engine._sleep_level, engine._weights = HalfAwake(), {"kv_cache"}, 2, object()
    engine.sleep()
    assert engine.llm.asleep == engine._asleep == {"weights", "kv_cache"}
    assert not engine._has_weights


class SlowReader:
    """Makes `engine` read prompts in a thread, each only when `may_read` allows; tells what is read, added, stepped."""

    def __init__(self, engine: VLLMEngine, patch: pytest.MonkeyPatch, may_read: Callable[[list[str]], bool]) -> None:
        self.told: list[str] = []
        self.changed = threading.Condition()
        inner = engine.llm.llm_engine
        render, add, step = inner.renderer.render_cmpl, inner.add_request, inner.step

        def slow_render(prompts: Any) -> Any:
            assert threading.current_thread().name.startswith(READER)
            with self.changed:
                assert self.changed.wait_for(lambda: may_read(self.told), timeout=60)
                self.told.append("read")
            return render(prompts)

        def told_add(number: str, *others: Any) -> Any:
            self.tell(f"added {number}")
            return add(number, *others)

        def told_step() -> Any:
            self.tell("step")
            return step()

        patch.setattr(engine, "_reads_ahead", True)
        patch.setattr(inner.renderer, "render_cmpl", slow_render)
        patch.setattr(inner, "add_request", told_add)
        patch.setattr(inner, "step", told_step)

    def tell(self, what: str) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()


def _unseen(processor: Processor, count: int, seed: int) -> list[EncodedPrompt]:
    """Prompts with images of noise, which no cache has."""
    noise = np.random.default_rng(seed)
    pictures = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]
    examples = [Example(f"{i}", (p,), f"Which organ is number {i}?", "", None, "test") for i, p in enumerate(pictures)]
    return [processor.encode_prompt(example) for example in examples]


@needs_vllm
def test_prompts_read_while_others_are_generated_get_the_same_completions(
    engine: VLLMEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _unseen(processor, 5, seed=1)
    params = SamplingParams(3, 40, 1.5, tuple(range(0, 500, 100)))
    expected = engine.generate(prompts, params)
    engine.reset_caches()
    with monkeypatch.context() as patch:
        # The next one is read only after four more steps.
        reader = SlowReader(engine, patch, lambda told: told.count("step") >= 4 * told.count("read"))
        assert engine.generate(prompts, params) == expected
    added = [what for what in reader.told if what.startswith("added")]
    assert added == [f"added {number}" for number in range(5)]
    steps_before = [reader.told[: reader.told.index(what)].count("step") for what in added]
    assert all(found >= 4 * number for number, found in enumerate(steps_before))
    assert reader.told.index("added 4") < len(reader.told) - 1


@needs_vllm
def test_a_prompt_that_cannot_be_read_ends_those_under_way(
    engine: VLLMEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _unseen(processor, 4, seed=2)
    broken = replace(prompts[2], input_ids=prompts[2].input_ids[1:])
    params = SamplingParams(2, 40, 1.0, (1, 2, 3, 4))
    with monkeypatch.context() as patch:
        SlowReader(engine, patch, lambda told: told.count("step") >= 2 * told.count("read"))
        with pytest.raises(RuntimeError, match="image processor") as caught:
            engine.generate([*prompts[:2], broken, prompts[3]], params)
    assert caught.value.__notes__ == [f"while vLLM read the prompt {prompts[2].message!r}"]
    assert "number 2" in prompts[2].message
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(READER)]
    # The engine never had that image, though the renderer has processed it.
    assert [len(group) for group in engine.generate(prompts, params)] == [2, 2, 2, 2]


@needs_vllm
def test_an_interrupt_waits_for_one_prompt_at_most(
    engine: VLLMEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _unseen(processor, 30, seed=3)

    def interrupt(*_: object) -> None:
        reader.tell("interrupted")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        reader = SlowReader(engine, patch, lambda told: "read" not in told or "interrupted" in told)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, SamplingParams(1, 8, 1.0, tuple(range(30))), interrupt)
    assert reader.told.count("read") < len(prompts)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate(prompts[:3], SamplingParams(1, 8, 0.0))) == 3


@needs_vllm
def test_sleep_keeps_everything_without_a_gpu(engine: VLLMEngine, prompts: list[EncodedPrompt]) -> None:
    before = engine.generate(prompts[:2], SamplingParams(1, 8, 0.0))
    engine.sleep()
    assert engine.generate(prompts[:2], SamplingParams(1, 8, 0.0)) == before


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
