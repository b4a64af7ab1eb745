"""The rollout engine against the model's own probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine

NUM_PROMPTS = 3


@pytest.fixture(scope="module")
def processor(tiny_policy: Path) -> Processor:
    return load_processor(_config(tiny_policy))


@pytest.fixture(scope="module")
def engine(tiny_policy: Path, processor: Processor) -> HFEngine:
    model = load_model(_config(tiny_policy).model)
    return HFEngine(model, processor, batch_size=512, weights=nullcontext)


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[EncodedPrompt]:
    dataset = PhantomDataset("train", size=40)
    encoded = sorted((processor.encode_prompt(example) for example in dataset), key=lambda p: len(p.input_ids))
    assert len(encoded[0].input_ids) < len(encoded[-1].input_ids)
    return [encoded[0], encoded[-1], encoded[len(encoded) // 2]]


def _config(tiny_policy: Path) -> Config:
    return Config.model_validate({"model": {"path": str(tiny_policy)}})


def _next_token_probabilities(engine: HFEngine, processor: Processor, prompt: EncodedPrompt) -> torch.Tensor:
    model = engine._model
    row = Row(prompt, (0,), torch.zeros(1), torch.zeros(1))
    batch = collate([row], processor, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.predicting][0]
    logits[list(processor.placeholder_ids)] = -torch.inf
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_tempered_softmax(
    engine: HFEngine, processor: Processor, prompts: list[EncodedPrompt], temperature: float
) -> None:
    count = 3000
    params = SamplingParams(count, 1, temperature, seeds=(11,))
    (completions,) = engine.generate(prompts[1:2], params)
    expected = torch.softmax(_next_token_probabilities(engine, processor, prompts[1]) / temperature, dim=-1)
    drawn = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(expected)) / count
    # Total variation of 3,000 honest draws stays below sqrt(V / count); a wrong temperature is far off.
    assert (drawn - expected).abs().sum() / 2 < 0.25
    top = expected.topk(40).indices
    error = (drawn[top].sum() - expected[top].sum()).abs()
    assert error < 4 * (expected[top].sum() * (1 - expected[top].sum()) / count).sqrt()


def test_completions_do_not_depend_on_the_batch(engine: HFEngine, prompts: list[EncodedPrompt]) -> None:
    together = engine.generate(prompts, SamplingParams(4, 12, 1.0, seeds=(1, 2, 3)))
    alone = [
        engine.generate([prompt], SamplingParams(4, 12, 1.0, seeds=(i + 1,)))[0] for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len({c.token_ids for group in together for c in group}) == 4 * NUM_PROMPTS


def test_greedy_takes_the_most_likely_token(
    engine: HFEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    groups = engine.generate(prompts, SamplingParams(1, 1, 0.0))
    best = [int(_next_token_probabilities(engine, processor, prompt).argmax()) for prompt in prompts]
    assert [group[0].token_ids for group in groups] == [(token,) for token in best]


def test_a_completion_ends_at_its_first_end_token(engine: HFEngine, prompts: list[EncodedPrompt]) -> None:
    (completions,) = engine.generate(prompts[:1], SamplingParams(256, 40, 1.0, seeds=(5,)))
    ends = set(engine._eos_ids)
    stopped = [c for c in completions if c.finish_reason == "stop"]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert stopped
    assert cut
    assert all(c.token_ids[-1] in ends and not ends & set(c.token_ids[:-1]) for c in stopped)
    assert all(len(c.token_ids) == 40 and not ends & set(c.token_ids) for c in cut)


def test_placeholders_are_never_sampled(engine: HFEngine, processor: Processor, prompts: list[EncodedPrompt]) -> None:
    (completions,) = engine.generate(prompts[:1], SamplingParams(256, 20, 1.0, seeds=(6,)))
    assert not {t for c in completions for t in c.token_ids} & set(processor.placeholder_ids)


def test_training_mode_is_restored(engine: HFEngine, prompts: list[EncodedPrompt]) -> None:
    engine._model.train()
    engine.generate(prompts[:1], SamplingParams(1, 2, 0.0))
    assert engine._model.training
    assert torch.is_grad_enabled()


def test_each_completion_is_told_of_as_it_ends(engine: HFEngine, prompts: list[EncodedPrompt]) -> None:
    told: list[tuple[int, int, Completion]] = []
    small = HFEngine(engine._model, engine._processor, batch_size=64, weights=nullcontext)  # two prompts at once
    params = SamplingParams(32, 40, 1.0, seeds=(5, 6, 7))
    groups = small.generate(prompts, params, lambda *what: told.append(what))
    assert sorted(told, key=lambda what: what[:2]) == [
        (i, j, completion) for i, group in enumerate(groups) for j, completion in enumerate(group)
    ]
    # Within a batch the shortest comes first; they differ in length, so their order is not that of the prompts.
    for batch in ({0, 1}, {2}):
        lengths = [len(completion.token_ids) for i, _, completion in told if i in batch]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]
    assert groups == small.generate(prompts, params)


def test_the_engine_is_the_model_itself(engine: HFEngine, prompts: list[EncodedPrompt]) -> None:
    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("there is nothing to copy")

    before = engine.generate(prompts[:1], SamplingParams(1, 3, 0.0))
    engine.sync(weights)
    engine.sleep()
    assert engine.generate(prompts[:1], SamplingParams(1, 3, 0.0)) == before
    assert before[0][0].logprobs is None
    engine.close()
