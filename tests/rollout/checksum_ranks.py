"""Run by the DeepSpeed launcher: do the engines of all processes hold the trainer's weights after every sync?

usage: deepspeed --num_gpus 2 checksum_ranks.py TENSOR_PARALLEL OUT CASE=FOLDER...

Every case is trained under ZeRO-2, then under ZeRO-3, with one engine; a case that ends in `lora` with adapters. What
is measured goes to OUT, one JSON line a process and stage; the test decides what is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from engine_logprobs import difference, policy_logits
from PIL import Image

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.records import EncodedPrompt, Example
from mrpo.rollout import SamplingParams
from mrpo.rollout.vllm_engine import VLLMEngine
from mrpo.runtime import Runtime
from mrpo.weights import checkpoint_weights

TEMPERATURE = 0.8


def main(tensor_parallel: int, out: Path, cases: dict[str, Path]) -> None:
    runtime = Runtime.start(0)
    engines = []  # an engine that is collected takes the process group with it
    for case, folder in cases.items():
        rollout = {"engine": "vllm", "tensor_parallel": tensor_parallel, "max_tokens": 12}
        config = Config.model_validate(
            {"model": {"path": str(folder)}, "rollout": rollout, "prompt": {"max_tokens": 256}}
        )
        processor = load_processor(config)
        engine = VLLMEngine(
            config.model,
            processor,
            max_tokens=12,
            max_images=2,
            max_concurrent=16,
            tensor_parallel=tensor_parallel,
            enforce_eager=True,
            num_gpu_blocks_override=64,
        )
        engines.append(engine)
        for stage in (2, 3):
            record = _measure(case, stage, config, processor, engine, runtime)
            with (out / f"rank{runtime.rank}.jsonl").open("a") as file:
                file.write(json.dumps({"case": case, "stage": stage} | record) + "\n")
    runtime.finish()


def _measure(
    case: str, stage: int, config: Config, processor: Processor, engine: VLLMEngine, runtime: Runtime
) -> dict[str, Any]:
    model = load_model(config.model)
    if case.endswith("lora"):
        _add_lora(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=0.02),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    # Each process has prompts of its own, and not even the same number of them.
    prompts = [_prompt(processor, 10 * runtime.rank + i, images=i % 3) for i in range(2 + runtime.rank)]
    engine.sync(lambda: checkpoint_weights(model, stage, bucket_bytes=100_000))
    start = _mismatch(engine, trainer, processor, prompts, seed=0)
    _train(trainer, processor, prompts[1])
    stale = _mismatch(engine, trainer, processor, prompts, seed=1)
    engine.sync(lambda: checkpoint_weights(model, stage, bucket_bytes=100_000))
    return {"start": start, "stale": stale, "synced": _mismatch(engine, trainer, processor, prompts, seed=2)}


def _add_lora(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = r".*language_model.*(q_proj|o_proj|down_proj)|.*visual.*qkv"
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets), model)


def _prompt(processor: Processor, seed: int, images: int) -> EncodedPrompt:
    generator = torch.Generator().manual_seed(seed)
    pictures = tuple(
        Image.fromarray(torch.randint(0, 256, (50 + 20 * i, 90, 3), generator=generator, dtype=torch.uint8).numpy())
        for i in range(images)
    )
    return processor.encode_prompt(Example(str(seed), pictures, "where is the effusion ? " * 4, "", None, "train"))


def _train(trainer: Any, processor: Processor, prompt: EncodedPrompt) -> None:
    """One step that moves every weight, those of the vision tower, too."""
    logits = policy_logits(trainer, processor, prompt, (3, 4, 5))
    trainer.backward(logits[logits.isfinite()].square().mean())
    trainer.step()


def _mismatch(engine: VLLMEngine, trainer: Any, processor: Processor, prompts: list[EncodedPrompt], seed: int) -> float:
    """The largest |Δ log p| of freshly sampled completions between the engine and the trainer."""
    seeds = tuple(1000 * seed + 100 * i + 10 * len(prompts) for i in range(len(prompts)))
    told: list[tuple[int, int]] = []
    groups = engine.generate(prompts, SamplingParams(2, 12, TEMPERATURE, seeds), lambda i, j, _: told.append((i, j)))
    assert sorted(told) == [(i, j) for i in range(len(prompts)) for j in range(2)]
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    # Under ZeRO-3 all processes must run the model equally often.
    rounds = [None] * dist.get_world_size()
    dist.all_gather_object(rounds, len(pairs))
    worst = 0.0
    for i in range(max(rounds)):
        prompt, completion = pairs[min(i, len(pairs) - 1)]
        worst = max(worst, difference(trainer, processor, prompt, completion, TEMPERATURE))
    return worst


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(int(words[0]), Path(words[1]), {case: Path(path) for case, path in (word.split("=") for word in words[2:])})
