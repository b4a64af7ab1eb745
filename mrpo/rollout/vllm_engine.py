"""Rollouts with a vLLM engine in this process, alone or together with the other processes of a run.

Token ids go in and come out. vLLM processes the images and expands their placeholders itself, once per prompt, and its
sampler draws each completion from a stream of its own, so completions do not depend on what else is under way, up to
rounding. On a GPU a thread processes images while the engine works on the prompts before them: which prompts share a
step, and with it the rounding, then depends on timing. Under a launcher every process holds an engine, or
`tensor_parallel` neighbours hold one together: they pool their prompts, run the same schedule, and each keeps the
completions of its own prompts.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrpo.backbones import Processor, model_folder
from mrpo.config import ModelConfig, RolloutConfig
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import OnDone, SamplingParams, Weights
from mrpo.rollout.vllm_request import (
    LOGPROBS_MODE,
    check_expansion,
    end_ids,
    make_completion,
    prompt_seeds,
    sampling_fields,
)
from mrpo.rollout.vllm_worker import load_weights

# A weight update needs the workers in this process; usage reports would leave the machine.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# On a CPU, processes of one machine must not pin their threads to the same cores nor take half its memory each.
_CPU_RANK_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
READER = "mrpo-reader"  # name of the thread that processes images
# Engines of launched processes: vLLM ends the process group, which is the run's, with a collected engine.
_KEPT: list[Any] = []

# What `add_request` takes, of prompts in order.
_Reading = deque[Future[tuple[str, Any, Any]]]


class VLLMEngine:
    """Continuous batching over as many completions as vLLM's scheduler holds.

    Args:
        max_tokens: the longest completion that will be asked for.
        max_images: the most images in a prompt.
        max_concurrent: completions under way at once.
        tensor_parallel: neighbouring processes that share one engine.
        sleep_level: what `sleep` does on a GPU: 0 nothing, 1 moves weights to the host, 2 drops them until `sync`.
        options: further arguments of `vllm.LLM`, which win.

    Raises:
        UserError: vLLM is not installed, or refuses the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        processor: Processor,
        *,
        max_tokens: int,
        max_images: int,
        max_concurrent: int,
        tensor_parallel: int = 1,
        sleep_level: int = 0,
        **options: Any,
    ) -> None:
        require_vllm()
        # Else vLLM makes a process group of its own.
        self._launched = dist.is_initialized()
        for name, value in environment(launched=self._launched).items():
            os.environ.setdefault(name, value)
        import vllm

        self._vllm = vllm
        self._processor = processor
        self._eos_ids = end_ids(model, processor)
        self._sleep_level = sleep_level if torch.cuda.is_available() else 0
        self._asleep: set[str] = set()
        self._weights: Weights | None = None
        self._has_weights = True
        self._pool = _Pool.start(tensor_parallel)
        # A CPU would gain nothing, and processes that share an engine must add each prompt before the same step.
        self._reads_ahead = torch.cuda.is_available() and tensor_parallel == 1
        side = math.isqrt(processor.max_image_pixels)
        arguments = {
            "model": model_folder(model.path),
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
            "max_model_len": processor.max_prompt_tokens + max_tokens,
            "max_num_seqs": max_concurrent,
            # The size is that of the pictures which vLLM measures its memory with.
            "limit_mm_per_prompt": {"image": {"count": max_images, "width": side, "height": side}, "video": 0},
            "mm_processor_kwargs": processor.family.processor_options(processor.image_processor),
            # The checkpoint's own sampling settings would silently change the distribution.
            "generation_config": "vllm",
            "logprobs_mode": LOGPROBS_MODE,
            # Only the end of a completion is looked at.
            "stream_interval": max(1, max_tokens),
            "enable_prefix_caching": True,
            "enable_sleep_mode": self._sleep_level > 0,
            "tensor_parallel_size": tensor_parallel,
            # Whole images per process: vision towers are small, and their heads need not divide.
            "mm_encoder_tp_mode": "data" if tensor_parallel > 1 else "weights",
            "seed": 0,
        }
        if self._launched:
            arguments["distributed_executor_backend"] = "external_launcher"
        if not torch.cuda.is_available():
            # On a CPU a prompt with a seed cannot be read in parts: generators there have no offset.
            arguments["enable_chunked_prefill"] = False
        try:
            self.llm = vllm.LLM(**(arguments | options))
        except (ValueError, OSError) as error:
            raise UserError(f"vLLM cannot load model.path={model.path}: {error}") from error

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """`params.num_completions` completions of each prompt, in order.

        Raises:
            RuntimeError: vLLM expands the image tokens of a prompt otherwise than we do.
        """
        if not self._has_weights:  # dropped by sleep, and the trainer's are still those of the last sync
            assert self._weights is not None
            self.sync(self._weights)
        self._wake("weights")
        self._wake("kv_cache")
        pooled, first = self._pool.gather(list(zip(prompts, prompt_seeds(params, len(prompts)), strict=True)))
        groups: list[dict[int, Completion]] = [{} for _ in prompts]
        with self._requests([(prompt, self._sampling(params, seed)) for prompt, seed in pooled]) as reading:
            for number, output in self._finished(reading):
                if not 0 <= number - first < len(prompts):
                    continue
                completion = self._completion(output)
                groups[number - first][output.index] = completion
                if on_done is not None:
                    on_done(number - first, output.index, completion)
        return [[group[i] for i in range(params.num_completions)] for group in groups]

    def sync(self, weights: Weights) -> None:
        """Loads the trained weights, from device memory to device memory, and forgets what the old ones computed."""
        self._wake("weights")
        self.llm.collective_rpc(load_weights, args=(weights(),))
        self._weights, self._has_weights = weights, True
        self.reset_caches()

    def reset_caches(self) -> None:
        """Forgets keys and values of prompts, image features, and processed images."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still generates: its prefix cache cannot be reset")
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.llm_engine.reset_mm_cache()

    def sleep(self) -> None:
        """Gives the device memory back; weights that were never synced are kept at level 2, too."""
        if self._sleep_level > 0 and "weights" not in self._asleep:
            self._wake("kv_cache")  # vLLM takes an engine that is half awake, after a sync, for asleep
            level = self._sleep_level if self._weights is not None else 1
            self.llm.sleep(level=level)
            self._asleep = {"weights", "kv_cache"}
            self._has_weights = level < 2

    def close(self) -> None:
        """Frees the engine's memory: all, or of one that can sleep what sleep frees, and the rest with the process.

        vLLM never lets go of the pool from which an engine that can sleep has its memory: a process can have but one.
        Under a launcher every engine ends with its process.
        """
        self.sleep()
        if self._launched:
            _KEPT.append(self.llm)
            return
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self.llm.wake_up(tags=[part])
            self._asleep.remove(part)

    @contextmanager
    def _requests(self, requests: Sequence[tuple[EncodedPrompt, Any]]) -> Iterator[_Reading]:
        """Hands `requests` to vLLM, numbered from 0, and takes those back that an error left unfinished.

        If the engine may work meanwhile, a thread reads them, and they are yielded to be added as they are read. It is
        one thread: the renderer's and the engine's caches of images must see the same prompts in the same order.
        """
        engine = self.llm.llm_engine
        numbered = [(str(number), prompt, sampling) for number, (prompt, sampling) in enumerate(requests)]
        with ThreadPoolExecutor(1, READER) as thread:
            try:
                if self._reads_ahead:
                    yield deque(thread.submit(self._read, *request) for request in numbered)
                else:
                    for request in numbered:
                        engine.add_request(*self._read(*request))
                    yield deque()
            except BaseException:
                thread.shutdown(cancel_futures=True)
                engine.abort_request([number for number, *_ in numbered])
                engine.reset_mm_cache()  # the engine lacks images that were read and not added
                raise

    def _read(self, number: str, prompt: EncodedPrompt, sampling: Any) -> tuple[str, Any, Any]:
        """A request as the engine takes it, its images processed."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        engine = self.llm.llm_engine
        try:
            (rendered,) = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, _request(prompt))])
            check_expansion(prompt, rendered["prompt_token_ids"])
        except Exception as error:
            error.add_note(f"while vLLM read the prompt {prompt.message!r}")
            raise
        return number, rendered, sampling

    def _finished(self, reading: _Reading) -> Iterator[tuple[int, Any]]:
        """(number of the request, vLLM's output) of every completion as it ends; adds what is read before each step."""
        engine = self.llm.llm_engine
        while reading or engine.has_unfinished_requests():
            while reading and (reading[0].done() or not engine.has_unfinished_requests()):
                engine.add_request(*reading.popleft().result())
            for answer in engine.step():
                yield from ((int(answer.request_id), o) for o in answer.outputs if o.finish_reason is not None)

    def _sampling(self, params: SamplingParams, seed: int | None) -> Any:
        fields = sampling_fields(params, seed, self._eos_ids, self._processor.placeholder_ids)
        return self._vllm.SamplingParams(
            **fields,
            logprobs=0 if params.temperature > 0 else None,  # of the drawn token alone
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.CUMULATIVE,
        )

    def _completion(self, output: Any) -> Completion:
        logprobs = output.logprobs
        if logprobs is not None:
            logprobs = [place[token].logprob for place, token in zip(logprobs, output.token_ids, strict=True)]
        return make_completion(output.token_ids, output.finish_reason, logprobs, self._processor)


@dataclass(frozen=True)
class _Pool:
    """The processes that share an engine; `group` is None for one alone."""

    group: Any
    rank: int

    @classmethod
    def start(cls, size: int) -> _Pool:
        """Every process must call this.

        Raises:
            UserError: the processes of the run cannot be split into pools of `size`.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        check_pool_size(size, world_size)
        if size == 1:
            return cls(None, 0)
        groups = [
            dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, world_size, size)
        ]
        number, rank = divmod(dist.get_rank(), size)
        if rank == 0:
            _remove_shared_memory(range(number * size, (number + 1) * size))
        dist.barrier(groups[number])
        return cls(groups[number], rank)

    def gather(self, own: list[tuple[EncodedPrompt, int | None]]) -> tuple[list[tuple[EncodedPrompt, int | None]], int]:
        """The prompts and seeds of all processes of the pool, and where those of this one begin."""
        if self.group is None:
            return own, 0
        # vLLM makes the vision tower's inputs itself.
        bare = [(replace(prompt, images={}), seed) for prompt, seed in own]
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, bare, group=self.group)
        return [item for part in parts for item in part], sum(len(part) for part in parts[: self.rank])


def _remove_shared_memory(ranks: Sequence[int]) -> None:
    """Removes what an earlier run's processes of these ranks left: on a CPU vLLM cannot start beside it.

    vLLM names this memory after the ranks alone, and a process that ends at once leaves it. To a run that is still
    under way it is no loss: its processes have opened it.
    """
    group = f"-[{'-'.join(map(str, ranks))}]-cpushm_"
    for file in Path("/dev/shm").glob("*cpushm_*"):
        if group in file.name:
            file.unlink(missing_ok=True)


def environment(*, launched: bool) -> dict[str, str]:
    """Environment variables that an engine in this process needs, if they are not set.

    On a GPU the same for all engines: vLLM compiles anew where one of its variables differs.
    """
    return _ENVIRONMENT | (_CPU_RANK_ENVIRONMENT if launched and not torch.cuda.is_available() else {})


def training_options(rollout: RolloutConfig) -> dict[str, Any]:
    """Arguments of `VLLMEngine` for an engine that gets its weights from a trainer beside it."""
    return {
        "tensor_parallel": rollout.tensor_parallel,
        "gpu_memory_utilization": rollout.gpu_memory,
        "enforce_eager": rollout.enforce_eager,
        **rollout.engine_options,
    }


def check_pool_size(size: int, world_size: int) -> None:
    """Checks that `world_size` processes make whole pools of `size`.

    Raises:
        UserError: they do not.
    """
    if world_size % size:
        raise UserError(f"rollout.tensor_parallel={size} must divide the number of processes, {world_size}")


def require_vllm() -> None:
    """Checks that vLLM is installed, without the seconds that importing it takes.

    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("the engine vllm needs a package: pip install mrpo[vllm], or use the engine hf")


def _request(prompt: EncodedPrompt) -> dict[str, Any]:
    """vLLM's TokensPrompt: one placeholder an image, and the images beside it."""
    request: dict[str, Any] = {"prompt_token_ids": list(prompt.text_ids)}
    if prompt.pictures:
        request["multi_modal_data"] = {"image": list(prompt.pictures)}
    return request
