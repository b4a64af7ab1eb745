"""What only a GPU can show of the colocated engine: memory given back in sleep, weights taken from the device."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from engine_logprobs import largest_difference

from mrpo.backbones import load_model, load_processor
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.rollout import SamplingParams
from mrpo.rollout.vllm_engine import VLLMEngine
from mrpo.weights import checkpoint_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]

CONFIG = Config.model_validate({"model": {"path": "phantom", "dtype": "bfloat16"}, "rollout": {"engine": "vllm"}})
# The largest |Δ log p| that bfloat16 makes of this model; old weights are further off.
ROUNDING = 1.0


def _free() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@torch.no_grad()
def _train(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator)).copy_(parameter.bfloat16())


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[VLLMEngine, int]]:
    """An engine, of which a process can have but one that sleeps, and the bytes that were free before."""
    before = _free()
    engine = VLLMEngine(
        CONFIG.model,
        load_processor(CONFIG),
        max_tokens=64,
        max_images=1,
        max_concurrent=64,
        sleep_level=2,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
    )
    yield engine, before
    engine.close()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_the_memory_back_and_the_engine_wakes_with_the_trained_weights(
    level: int, started: tuple[VLLMEngine, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, before = started
    monkeypatch.setattr(engine, "_sleep_level", level)
    processor = load_processor(CONFIG)
    model = load_model(CONFIG.model).float()  # on the CPU, with weights that bfloat16 can hold
    prompts = [processor.encode_prompt(example) for example in PhantomDataset("test", size=16)]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.cuda().bfloat16()) for name, tensor in checkpoint_weights(model, zero_stage=0))

    def mismatch(seed: int) -> float:
        groups = engine.generate(prompts, SamplingParams(2, 64, 1.0, tuple(range(seed, seed + 1600, 100))))
        return largest_difference(model, processor, prompts, groups, 1.0)

    engine.sync(weights)
    assert mismatch(0) < ROUNDING
    held = before - _free()
    engine.sleep()
    assert before - _free() < 0.1 * held
    _train(model)
    engine.sync(weights)
    assert mismatch(1) < ROUNDING
    greedy = SamplingParams(1, 64, 0.0)
    engine.reset_caches()  # as after sleep: prompts of which a part is cached are computed in another shape
    awake = engine.generate(prompts, greedy)
    engine.sleep()
    assert engine.generate(prompts, greedy) == awake  # wakes by itself, with the same weights
    _train(model)
    assert mismatch(2) > ROUNDING  # a sync that is left out shows
