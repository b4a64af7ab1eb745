"""Four ways to the gradient of one optimizer step, on the same weights, prompts and completions.

Ours runs what the trainer runs: planner, passes, packed rows, the fused head; only DeepSpeed and its optimizer stay
out. The others are the forms of TRL and of the paper's code in their plainest shape, on modules of their own that share
every parameter with ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peers
import torch
from random_models import image_tokens_of, make_prompt, processor_of
from torch.utils.flop_counter import FlopCounterMode

from mrpo.backbones import batch_images, to_device
from mrpo.backbones.packed import use_packed_rows
from mrpo.backbones.patches import embed_patches_by_product
from mrpo.batching import DenseBatch, PackedBatch, Row, collate, pack
from mrpo.config import Config
from mrpo.efficiency import make_efficient
from mrpo.pass_runner import PassRunner
from mrpo.passes import Pass, Planner, cost_model, padding_multiple
from mrpo.policy_module import PolicyModule
from mrpo.runtime import Runtime

# Of TRL's GRPOConfig and of the paper's settings.
TRL_MICRO_BATCH, REFERENCE_MICRO_BATCH = 8, 2
# As many as fit an H200 beside 8 billion parameters and their gradients.
PLAIN_MICRO_BATCH = 4
# Parameters whose gradients are compared: the head, and about this many others.
COMPARED = 8


@dataclass(frozen=True)
class Shape:
    """P prompts of one image and some text, with G completions each of T tokens."""

    prompts: int
    group: int
    image_tokens: int
    text_tokens: int
    length: int

    @property
    def samples(self) -> int:
        return self.prompts * self.group


class Alone(Runtime):
    """One process without a process group."""

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]


class PlainEngine:
    """What passes ask of DeepSpeed's engine, by plain autograd."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = None

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def make_rows(config: Any, shape: Shape, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Random prompts, completions and advantages; the loss is the mean over all tokens. Images in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    vocab = config.get_text_config().vocab_size
    tokens = image_tokens_of(config, shape.image_tokens)
    rows = []
    for _ in range(shape.prompts):
        made = make_prompt(config, tokens, shape.text_tokens, generator)
        prompt = replace(made, images=to_device(made.images, torch.device("cpu"), dtype))
        for _ in range(shape.group):
            token_ids = tuple(torch.randint(1, vocab * 9 // 10, (shape.length,), generator=generator).tolist())
            advantages = torch.randn(shape.length, generator=generator)
            weights = torch.full((shape.length,), 1.0 / (shape.samples * shape.length))
            rows.append(Row(prompt, token_ids, advantages, weights))
    return rows


class Ways:
    """The ways on one model. Each gives the log-probabilities of all completion tokens, in the order of the rows, and
    leaves gradients in the model's parameters."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        embed_patches_by_product(model)  # as `load_model`: the 3-D convolution is nobody's choice
        self.plain = model
        self.device, self.dtype = device, dtype
        self.processor = processor_of(model)
        self._checkpointed = sharing_copy(model)
        self._checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._ours = sharing_copy(model)
        self._runtime = Alone(0, 1, device)
        options: dict[str, Any] = {"model": {"dtype": str(dtype).removeprefix("torch.")}, "loss": {"beta": 0.0}}
        options |= {"optim": {"micro_batch_size": TRL_MICRO_BATCH}, "update": {"checkpointing": "none"}}
        self.config = Config(**options)
        self.efficiency = str(make_efficient(self._ours, self.config, self._runtime))
        self.messages: list[str] = []
        use_packed_rows(self._ours, self.processor.family)

    def ours(self, rows: Sequence[Row], **options: Any) -> torch.Tensor:
        """As `Policy.update`, with these options of `update`."""
        config = self.config.model_copy(update={"update": self.config.update.model_copy(update=options)})
        attention = None if config.update.attention == "auto" else config.update.attention
        module = PolicyModule(self._ours, self.processor.family, config.loss, 1.0, attention)
        costs = cost_model(self._ours, self.processor.family, config, self.device)
        planner = Planner(config, self.processor, self._runtime, costs)
        runner = PassRunner(planner, zero_stage=0)

        def forward(passed: Pass) -> tuple[torch.Tensor, torch.Tensor]:
            loss, logprobs, *_ = module(self._batch(passed))
            return loss, logprobs.detach()

        passes = ((passed, False) for passed in planner.plan(rows))
        results = runner.accumulate(passes, PlainEngine(module), forward)
        self.messages += [*planner.messages, *runner.messages]
        return in_order(results, len(rows))

    def _batch(self, passed: Pass) -> DenseBatch | PackedBatch:
        if not passed.packed:
            return collate(passed.rows, self.processor, self.device, self.dtype)
        multiple = padding_multiple(self.config, self.device)
        return pack(passed.rows, self.processor, self._ours.model, self.device, self.dtype, multiple=multiple)

    def trl(self, rows: Sequence[Row], *, checkpointed: bool = True) -> torch.Tensor:
        """Dense; TRL's kernel on the hidden states of the completions."""
        model, micro_batch = (self._checkpointed, TRL_MICRO_BATCH) if checkpointed else (self.plain, PLAIN_MICRO_BATCH)
        return self._dense(rows, micro_batch, partial(_completion_logprobs, model, peers.trl_logprobs))

    def reference(self, rows: Sequence[Row]) -> torch.Tensor:
        """Dense; logits and log-probabilities of prompt and completion alike."""
        return self._dense(rows, REFERENCE_MICRO_BATCH, partial(_all_logprobs, self._checkpointed))

    def truth(self, rows: Sequence[Row]) -> torch.Tensor:
        """Dense, one row at a time, nothing fused."""
        return self._dense(rows, 1, partial(_completion_logprobs, self.plain, _plain_logprobs))

    def _dense(
        self, rows: Sequence[Row], micro_batch: int, logprobs_of: Callable[[DenseBatch], torch.Tensor]
    ) -> torch.Tensor:
        found = []
        for start in range(0, len(rows), micro_batch):
            batch = collate(rows[start : start + micro_batch], self.processor, self.device, self.dtype)
            logprobs = logprobs_of(batch)
            peers.clipped(batch, logprobs.float()).backward()
            found.append(logprobs.detach().float())
        return torch.cat(found)

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Every weight in fp32 within, and as it was behind: bf16 widened and narrowed again is the same."""
        dtype = self.dtype
        try:
            self._turn_into(torch.float32)
            yield
        finally:
            self._turn_into(dtype)

    def _turn_into(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.plain.zero_grad(set_to_none=True)
        for parameter in self.plain.parameters():
            parameter.data = parameter.data.to(dtype)

    def compared(self) -> list[torch.nn.Parameter]:
        """The head and a few other matrices, from the first layers of both towers to the last ones."""
        matrices = [parameter for parameter in self.plain.parameters() if parameter.ndim >= 2]
        spread = matrices[:: max(1, len(matrices) // COMPARED)]
        head = self.plain.lm_head.weight
        return [head, *(parameter for parameter in spread if parameter is not head)]

    def gradients(self, way: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> list[torch.Tensor]:
        """The log-probabilities, and the gradients that are compared."""
        self.plain.zero_grad(set_to_none=True)
        logprobs = way(rows)
        return [logprobs, *(parameter.grad for parameter in self.compared() if parameter.grad is not None)]

    def flops(self, shape: Shape, rows: Sequence[Row], *, packed: bool, full_logits: bool = False) -> float:
        """Of a forward and backward pass in this form, recomputation not counted.

        2 FLOPs a weight and token forward, 4 backward; attention 4 D Hq a pair forward, 8 D Hq backward; the vision
        tower as PyTorch counts its forward, three times.
        """
        text = self.plain.config.get_text_config()
        prompt = len(rows[0].prompt.input_ids)
        layers = self.plain.model.language_model.layers
        matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim >= 2)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        own = shape.length * (shape.length + 1) / 2 + prompt * shape.length
        prompts = shape.prompts if packed else shape.samples
        tokens = prompts * prompt + shape.samples * shape.length
        pairs = prompts * prompt * (prompt + 1) / 2 + shape.samples * own
        decoder = 6.0 * matrices * tokens + 12.0 * pairs * text.num_attention_heads * head_dim * len(layers)
        head_tokens = tokens if full_logits else shape.samples * shape.length
        head = 6.0 * self.plain.lm_head.weight.numel() * head_tokens
        return decoder + head + prompts * self._image_flops(rows[0])

    def _image_flops(self, row: Row) -> float:
        images = batch_images([row.prompt], self.device, self.dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.processor.family.image_features(self.plain.model, images, {})
        return 3.0 * counter.get_total_flops()


def sharing_copy(model: Any) -> Any:
    """A copy of the modules with the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def in_order(results: Sequence[tuple[Pass, torch.Tensor]], count: int) -> torch.Tensor:
    """Log-probabilities of passes, put into the order of the `count` rows that were planned."""
    found: list[torch.Tensor] = [torch.empty(0)] * count
    for passed, logprobs in results:
        parts = logprobs.float().split([len(row.token_ids) for row in passed.rows])
        for place, part in zip(passed.places, parts, strict=True):
            if place >= 0:
                found[place] = part
    return torch.cat(found)


LogprobsOfHidden = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _completion_logprobs(model: Any, logprobs: LogprobsOfHidden, batch: DenseBatch) -> torch.Tensor:
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.predicting]
    return logprobs(hidden, model.lm_head.weight, batch.targets)


def _plain_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _all_logprobs(model: Any, batch: DenseBatch) -> torch.Tensor:
    """Row by row over all positions, as the paper's code; those that predict a completion are taken at the end."""
    logits = model(**batch.inputs, use_cache=False).logits
    following = batch.inputs["input_ids"].roll(-1, dims=1)
    pairs = zip(logits, following, strict=True)
    rows = [row.log_softmax(-1).gather(1, tokens[:, None])[:, 0] for row, tokens in pairs]
    return torch.cat(rows)[batch.predicting]
