"""Rollout engines: prompts in, completions out, token for token what the sampler drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mrpo.records import Completion, EncodedPrompt

if TYPE_CHECKING:
    from mrpo.backbones import Processor
    from mrpo.config import Config
    from mrpo.policy import Policy
    from mrpo.runtime import Runtime

# (index of the prompt, index within its group, the completion), told the moment that completion ends, in any order, by
# the caller's thread or another.
OnDone = Callable[[int, int, Completion], None]
# Checkpoint names and whole tensors; where weights are sharded, every process must iterate in step.
Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `seeds` names one seed per prompt (unused when greedy)."""

    num_completions: int
    max_tokens: int
    temperature: float
    seeds: tuple[int, ...] = ()


class RolloutEngine(Protocol):
    """Generates completions with the policy's weights. Every process calls every method, in the same order."""

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """`params.num_completions` completions of each prompt, in order."""
        ...

    def sync(self, weights: Weights) -> None:
        """Takes over the trained weights and forgets whatever was computed with the old ones."""
        ...

    def sleep(self) -> None:
        """Gives the device memory back to training, until the next `sync` or `generate`."""
        ...

    def close(self) -> None:
        """Ends the engine; it is of no use afterwards."""
        ...


def check_engine(config: Config, world_size: int) -> None:
    """Refuses an engine that cannot start, before weights are loaded.

    Raises:
        UserError: vLLM is not installed, or `rollout.tensor_parallel` does not divide the `world_size` processes.
    """
    if config.generates and config.rollout.engine == "vllm":
        from mrpo.rollout.vllm_engine import check_pool_size, require_vllm

        require_vllm()
        check_pool_size(config.rollout.tensor_parallel, world_size)


def make_engine(
    config: Config, processor: Processor, policy: Policy, runtime: Runtime, *, max_images: int = 1
) -> RolloutEngine:
    """The engine that `rollout.engine` names, holding the weights of `policy`. Every process must call this.

    A run that samples nothing gets one that costs nothing.

    Args:
        max_images: the most images in a prompt.

    Raises:
        UserError: vLLM is not installed or refuses the model, or a server is down or serves something else.
    """
    rollout = config.rollout
    if rollout.engine == "hf" or not config.generates:
        from mrpo.rollout.hf import HFEngine

        return HFEngine(policy.model, processor, batch_size=rollout.batch_size, weights=policy.whole_weights)
    engine: RolloutEngine
    if rollout.engine == "vllm":
        from mrpo.rollout.vllm_engine import VLLMEngine, training_options

        engine = VLLMEngine(
            config.model,
            processor,
            max_tokens=rollout.max_tokens,
            max_images=max_images,
            max_concurrent=rollout.batch_size * rollout.tensor_parallel,
            sleep_level=rollout.sleep_level,
            **training_options(rollout),
        )
    else:
        from mrpo.rollout.vllm_server import VLLMServerEngine

        engine = VLLMServerEngine(config, processor, runtime, max_images=max_images)
    engine.sync(policy.weights)
    return engine
