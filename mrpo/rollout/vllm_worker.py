"""New weights inside vLLM's workers: loaded in place by the engine's own process, or received by a server's.

A server must be started with `--worker-extension-cls mrpo.rollout.vllm_worker.WeightReceiver`; see `vllm_server`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mrpo.rollout.weight_group import WeightGroup, find_store, own_address


def load_weights(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Loads a whole checkpoint into the model of a vLLM worker; tensors on its own device never leave it.

    Raises:
        RuntimeError: some of the model's weights were not among them.
    """
    model = worker.model_runner.get_model()
    if worker.device.type == "cpu":
        # There vLLM keeps linear layers repacked for the processor, which only its own reload undoes and redoes.
        worker.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        _repack_head(model)
        return
    with torch.no_grad():
        loaded = model.load_weights(weights)
        # Qwen3-VL's sums for the first layers are no buffers, which sleep would restore, and no weights.
        for sums in getattr(model, "deepstack_input_embeds", None) or ():
            sums.zero_()
    torch.cuda.synchronize(worker.device)
    missing = {name for name, _ in model.named_parameters()} - loaded if loaded is not None else ()
    if missing:
        raise RuntimeError(f"vLLM was given no weights for {', '.join(sorted(missing)[:3])}")


def _repack_head(model: torch.nn.Module) -> None:
    """Packs the head again: one that is tied to the embeddings is given no weights, and vLLM's reload forgets it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class WeightReceiver:
    """What a server's workers are asked over HTTP; arguments and answers are text."""

    _buckets: list[bytes]
    _host: str
    _store: Any
    _weight_group: WeightGroup | None = None

    def mrpo_describe(self) -> dict[str, Any]:
        """What the server serves, in the words of its configuration."""
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        return {
            "model": config.hf_config.to_dict(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": str(config.logprobs_mode),
        }

    def mrpo_find_store(self, host: str, port: str, size: str) -> None:
        """Meets the trainer at `host`, `port`, where `size` processes are to form a group."""
        self._host, self._store = own_address(host, int(port)), find_store(host, int(port), int(size))

    def mrpo_join(self, first: str, size: str, seconds: str) -> None:
        """Becomes a member of the group of `size`; the first of the server's workers is its member number `first`."""
        rank: int = int(first) + self.rank  # type: ignore[attr-defined]
        device: torch.device = self.device  # type: ignore[attr-defined]
        address, store = self._host, self._store
        self._weight_group = WeightGroup(store, rank, int(size), device, address=address, seconds=float(seconds))

    def mrpo_is_member(self) -> bool:
        """Whether this worker belongs to the group of a trainer."""
        return self._weight_group is not None

    def mrpo_receive_weights(self) -> None:
        """Loads what the trainer sends through the group."""
        assert self._weight_group is not None  # the trainer asked
        received = self._weight_group.receive()
        try:
            load_weights(self, received)
        finally:
            for _ in received:  # the trainer and the other members go on
                pass

    def mrpo_load_from_folder(self, folder: str) -> None:
        """Loads the safetensors files of `folder`, in the order of their names."""
        load_weights(self, _folder_weights(Path(folder), self.device))  # type: ignore[attr-defined]

    def mrpo_receive_bucket(self, position: str, content: str) -> None:
        """Keeps one bucket, safetensors in base64, and loads all of them after the last one.

        `position` is "first", "next", "last" or, if there is just one, "only".
        """
        if position in ("first", "only"):
            self._buckets = []
        self._buckets.append(base64.b64decode(content))
        if position in ("last", "only"):
            buckets, self._buckets = self._buckets, []
            load_weights(self, _bucket_weights(buckets, self.device))  # type: ignore[attr-defined]


def _folder_weights(folder: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from safetensors.torch.load_file(file, device=str(device)).items()


def _bucket_weights(buckets: list[bytes], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        for name, tensor in safetensors.torch.load(bucket).items():
            yield name, tensor.to(device)
