"""The trained model under DeepSpeed: log-probabilities, optimizer steps, whole weights on demand.

The caller gives each token's weight so that the sum over all tokens of all processes is the loss; DeepSpeed averages
gradients over processes, hence the factor `world_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import deepspeed
import torch
from torch.nn.utils import get_total_norm

from mrpo.backbones import Processor, write_prompt_style
from mrpo.backbones.lora import has_adapters, merged_state_dict, save_adapters
from mrpo.backbones.packed import use_packed_rows
from mrpo.batching import DenseBatch, PackedBatch, Row, collate, pack
from mrpo.config import Config, Packing
from mrpo.deepspeed_config import deepspeed_config
from mrpo.efficiency import make_efficient
from mrpo.pass_runner import PassRunner
from mrpo.passes import Pass, Planner, cost_model, padding_multiple
from mrpo.policy_module import PolicyModule
from mrpo.reference import Reference, adapter_reference, copy_reference
from mrpo.runtime import Runtime
from mrpo.update_stats import (
    STAT_NAMES,
    PassResult,
    UpdateStats,
    computed_tokens,
    mismatch,
    stat_sums,
    work,
    work_metrics,
)
from mrpo.weights import checkpoint_weights
from mrpo.whole_files import partial_path, remove_path, replace_folder

__all__ = ["STAT_NAMES", "NonFiniteLossError", "Part", "Policy", "UpdateStats", "work_metrics"]

# Rows of an update, and whether they are the last.
Part: TypeAlias = tuple[Sequence[Row], bool]


def loss_temperature(config: Config) -> float:
    """What logits are divided by in the loss: the sampler's temperature; what sft imitates was sampled at none."""
    return 1.0 if config.algorithm == "sft" else config.rollout.temperature


class Policy:
    """The model, its DeepSpeed engine and, if the loss has a KL term, the frozen reference."""

    def __init__(self, model: Any, processor: Processor, config: Config, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self.processor = processor
        family, device = processor.family, runtime.device
        attention = None if config.update.attention == "auto" else config.update.attention
        efficiency = make_efficient(model, config, runtime)
        if config.update.packing != "dense":
            use_packed_rows(model, family)
        module = PolicyModule(model, family, config.loss, loss_temperature(config), attention)
        self._planner = Planner(config, processor, runtime, cost_model(model, family, config, device))
        self._runner = PassRunner(self._planner, config.deepspeed.zero_stage)
        self._runner.messages.append(str(efficiency))
        needs_reference = config.algorithm != "sft" and config.loss.beta > 0
        adapted = has_adapters(model)
        self._reference: Reference | None = None
        if needs_reference and not adapted:
            self._reference = copy_reference(module, config, device)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optim = config.optim
        optimizer = torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
        )
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, config=deepspeed_config(config)
        )
        if needs_reference and adapted:
            self._reference = adapter_reference(self.engine, model)

    @property
    def model(self) -> Any:
        """The Hugging Face model that is trained."""
        return self.engine.module.model

    @property
    def packing(self) -> Packing:
        """How rows are packed: as `update.packing` says, and where that is auto, as it chose by its first rows."""
        return self._planner.packing

    @packing.setter
    def packing(self, packing: Packing) -> None:
        self._planner.packing = packing

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """A context in which every parameter is whole on every process, and forward passes need not keep step."""
        if self._config.deepspeed.zero_stage < 3:
            yield
            return
        parameters = list(self.engine.module.parameters())
        offload = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(parameters):
            # ZeRO-3's hooks would fetch and release the gathered parameters layer by layer, in step with the other
            # processes, whose completions are of other lengths.
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            offload._remove_module_hooks()
            try:
                yield
            finally:
                offload.forward_hooks, offload.backward_hooks = [], []
                offload.setup_zero_stage3_hooks()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name in the checkpoint and whole tensor of every weight; see `checkpoint_weights`."""
        return checkpoint_weights(self.model, self._config.deepspeed.zero_stage)

    def with_logprobs(self, rows: Sequence[Row], *, old: bool) -> list[Row]:
        """`rows` with the reference's log-probabilities if there is one and, if asked, the policy's as the old ones.

        Advantages and weights are not looked at. Every process must call this at the same time.
        """
        if old:
            logprobs = self._logprobs(self.engine, rows)
            rows = [replace(row, old_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
        if self._reference is not None:
            with self._reference() as module:
                logprobs = self._logprobs(module, rows)
            rows = [replace(row, ref_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
        return list(rows)

    def update(self, rows: Sequence[Row], lr: float) -> UpdateStats:
        """`update_in_parts` on rows that are all there."""
        return self.update_in_parts([(rows, True)], lr)

    def update_in_parts(self, parts: Iterable[Part], lr: float) -> UpdateStats:
        """One optimizer step on the rows of all parts, each computed as soon as it is there.

        Every process must call this at the same time, with equally many parts, whether they have rows or not. Rows that
        cannot move the loss are not computed: all their weights are 0 or, without a KL term, advantages.

        Raises:
            NonFiniteLossError: the loss is not finite on any process; no weight has changed.
            UserError: a pass does not fit the device's memory; see `PassRunner`.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        splits = self._runner.splits
        results = self._runner.accumulate(self._passes(parts), self.engine, self._forward)
        self._require_finite(results)
        own_norm = self._plain_grad_norm()
        self.engine.step()
        return UpdateStats(
            sums=stat_sums(results),
            work=work(results, self._runner.splits - splits),
            grad_norm=float(self.engine.get_global_grad_norm() if own_norm is None else own_norm),
            mismatch=mismatch(results),
            messages=self._take_messages(),
        )

    def export(self, folder: Path) -> None:
        """Writes model, tokenizer and image processor in Hugging Face format. Every process must call this.

        Adapters are merged into the weights, and also written by themselves, to `folder`/adapter. Whatever kills the
        run, a folder of that name is whole.
        """
        with self.whole_weights():
            if self._runtime.is_main:
                folder = folder.resolve()  # it may be a link to another disk
                partial = partial_path(folder)
                remove_path(partial)
                self._write(partial)
                replace_folder(partial, folder)
        self._runtime.barrier()

    def _write(self, folder: Path) -> None:
        adapted = has_adapters(self.model)
        self.model.save_pretrained(folder, state_dict=merged_state_dict(self.model) if adapted else None)
        if adapted:
            save_adapters(self.model, folder / "adapter")
        self.processor.tokenizer.save_pretrained(folder)
        self.processor.image_processor.save_pretrained(folder)
        write_prompt_style(folder, self.processor)

    def _logprobs(self, module: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
        """(T,) log-probabilities of each row's completion tokens under `module`, without gradients."""
        bare = [replace(row, old_logprobs=None, ref_logprobs=None, sampler_logprobs=None) for row in rows]
        logprobs = [torch.empty(0)] * len(rows)
        with torch.no_grad():
            results = self._runner.run(
                self._planner.plan(bare), lambda passed: module(self._batch(passed), only_logprobs=True)[0]
            )
        for passed, found in results:
            lengths = [len(row.token_ids) for row in passed.rows]
            for place, values in zip(passed.places, found.cpu().split(lengths), strict=True):
                if place >= 0:
                    logprobs[place] = values
        return logprobs

    def _passes(self, parts: Iterable[Part]) -> Iterator[tuple[Pass, bool]]:
        """The passes of an update, and whether they are the last."""
        for rows, is_last in parts:
            used = [row for row in rows if computed_tokens(row).any()]
            if not is_last and not self._runtime.any(bool(used)):
                continue
            passes = self._planner.plan(used, move=True, images=any(row.prompt.images for row in rows))
            for passed in passes:
                yield passed, is_last and passed is passes[-1]

    def _forward(self, passed: Pass) -> tuple[torch.Tensor, PassResult]:
        batch = self._batch(passed)
        loss, logprobs, clipped, kl, entropy = self.engine(batch)
        return loss * self._runtime.world_size, PassResult(batch.size, loss.detach(), logprobs, clipped, kl, entropy)

    def _batch(self, passed: Pass) -> DenseBatch | PackedBatch:
        device, dtype = self._runtime.device, getattr(torch, self._config.model.dtype)
        if not passed.packed:
            return collate(passed.rows, self.processor, device, dtype)
        multiple = padding_multiple(self._config, device)
        return pack(passed.rows, self.processor, self.model.model, device, dtype, multiple=multiple)

    def _require_finite(self, results: Sequence[tuple[Pass, PassResult]]) -> None:
        bad = [passed for passed, result in results if not bool(torch.isfinite(result.loss))]
        if self._runtime.any(bool(bad)):
            ranks = [rank for rank, found in enumerate(self._runtime.gather_objects(bool(bad))) if found]
            raise NonFiniteLossError(ranks, list(bad[0].rows) if bad else [])

    def _plain_grad_norm(self) -> torch.Tensor | None:
        """The gradient norm before clipping where DeepSpeed keeps none: its plain fp32 engine (ZeRO 0)."""
        if self._config.deepspeed.zero_stage > 0 or self._config.model.dtype != "float32":
            return None
        return get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def _take_messages(self) -> tuple[str, ...]:
        messages = (*self._planner.messages, *self._runner.messages)
        self._planner.messages, self._runner.messages = [], []
        return messages


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite on the processes `ranks`; `rows` are those of this process's first such pass."""

    def __init__(self, ranks: Sequence[int], rows: Sequence[Row]) -> None:
        super().__init__("the loss is not finite")
        self.ranks = ranks
        self.rows = rows
