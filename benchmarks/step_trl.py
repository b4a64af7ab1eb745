"""A whole step in TRL's GRPOTrainer: its generation, its loop, its loss, its optimizer.

Rewards are ours and so is the judge's client, awaited in an asynchronous reward function for all completions at once,
as TRL runs such functions. Completions are held at one length by the generation settings that TRL passes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from model_folders import examples
from step_ours import GPU_MEMORY, LONGEST_SEQUENCE, make_config
from step_setting import FROZEN, GRPO, LORA_RANK, MICRO_BATCH, Setting
from step_way import CountingScorer, Sampled, compared_names, compared_part, plain_name, same_adapters
from transformers import AutoProcessor, BatchFeature, ProcessorMixin, TrainerCallback
from transformers.utils import is_torchvision_available
from trl import GRPOConfig, GRPOTrainer

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import ModelConfig
from mrpo.integrations.trl import to_dataset
from mrpo.judge import make_judge
from mrpo.records import Completion
from mrpo.scoring import Scorer
from mrpo.stopwatch import Stopwatch

_IMAGE = "<|image_pad|>"
_LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class PictureProcessor(ProcessorMixin):
    """Tokenizer and image processor in one, where Transformers' own processor of the family lacks torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.own: Processor

    def __call__(
        self, images: Any = None, text: Sequence[str] = (), padding: bool = False, **kwargs: Any
    ) -> BatchFeature:
        flat = [picture for pictures in images or () for picture in pictures or ()]
        tensors, counts = self.own.family.process_images(self.image_processor, flat, self.own.model_config)
        expanded, remaining = [], iter(counts)
        for part in text:
            before, *behind = part.split(_IMAGE)
            expanded.append(before + "".join(_IMAGE * next(remaining) + piece for piece in behind))
        tokens = self.tokenizer(expanded, add_special_tokens=False, padding=padding)
        ids, mark = tokens["input_ids"], self.own.model_config.image_token_id
        columns: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": [[int(token == mark) for token in row] for row in ids],
        }
        if kwargs.get("return_tensors") == "pt":
            columns = {name: torch.tensor(rows) for name, rows in columns.items()}
        return BatchFeature({**columns, **tensors})

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: Any = None, **kwargs: Any
    ) -> Any:
        is_one = isinstance(conversation[0], dict)
        conversations = [conversation] if is_one else conversation
        options = {"tokenize": False, "add_generation_prompt": True}
        texts = [self.tokenizer.apply_chat_template(messages, **options) for messages in conversations]
        if not kwargs.get("tokenize"):
            return texts[0] if is_one else texts
        images = [
            [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
            for messages in conversations
        ]
        return self(images=images, text=texts)


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a stopwatch at its stages."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch = Stopwatch()
        self.tokens = 0
        super().__init__(*args, **kwargs)
        if self.use_vllm:
            vars(self.vllm_generation)["sync_weights"] = self._timed("sync", self.vllm_generation.sync_weights)

    def _timed(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stopwatch.measure(stage):
                return run(*args, **kwargs)

        return timed

    def _generate(self, prompts: list[Any]) -> Any:
        with self.stopwatch.measure("rollout"):
            found = super()._generate(prompts)
        self.tokens += sum(map(len, found[1]))
        return found

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:  # which expands the placeholder of an image itself, also where it was expanded before
            mark = self.model.config.image_token_id
            prompt_ids = [one_placeholder_an_image(ids, mark) for ids in prompt_ids]
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.stopwatch.measure("judge"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.stopwatch.measure("logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def take(self) -> dict[str, float]:
        """Seconds of the stages since the last call; what is no other stage is the update."""
        seconds = self.stopwatch.take()
        whole = seconds.pop("step")
        seconds["rollout"] -= seconds.get("sync", 0.0)  # done where the next rollout begins
        seconds["update"] = whole - sum(seconds.values())
        tokens, self.tokens = self.tokens, 0
        return {"seconds": whole, "tokens": float(tokens), **{f"{name} s": value for name, value in seconds.items()}}


class TrlWay:
    """The training loop is TRL's own and runs in the middle of `run`; a callback lets it wait for the next step."""

    def __init__(self) -> None:
        self._trainer: TimedTrainer | None = None
        self._scorer: CountingScorer | None = None

    def prepare(self, setting: Setting, folder: Path) -> None:
        self.close()
        config = make_config(setting, ahead=False, algorithm=GRPO, folder=folder)
        own = load_processor(config)
        own.tokenizer.padding_side = "left"
        judge = make_judge(config.judge, "phantom")
        self._scorer = CountingScorer(config, judge, own.tokenizer, own.think_tag)
        train_set = examples(Path(setting.model), setting.prompts, setting.image_tokens)
        self._trainer = TimedTrainer(
            load_model(ModelConfig(path=setting.model, dtype=config.model.dtype)),
            reward(self._scorer, {example.id: example for example in train_set}),
            trl_config(setting, own, folder),
            train_dataset=to_dataset(train_set, instruction=own.instruction),
            processing_class=_processing_class(own, setting.model),
            peft_config=_peft_config() if setting.lora else None,
        )
        same_adapters(self.trainer.model)

    @property
    def trainer(self) -> TimedTrainer:
        assert self._trainer is not None
        return self._trainer

    def run(self, wait: Callable[[], bool], done: Callable[[dict[str, float]], None]) -> None:
        """Trains; before each step `wait` returns when it may begin (False: no more), and `done` is told of it."""
        assert self._scorer is not None
        trainer, judged = self.trainer, self._scorer.take

        class Pace(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if not wait():
                    raise _EndedError
                self.timing = trainer.stopwatch.measure("step")
                self.timing.__enter__()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.timing.__exit__(None, None, None)
                done(trainer.take() | {"judged": judged()})

        trainer.add_callback(Pace)
        try:
            trainer.train()
        except _EndedError:
            trainer.remove_callback(Pace)

    def gradients(self, sampled: Sequence[Sampled]) -> Mapping[str, torch.Tensor]:
        """TRL makes its own batch of given completions, and computes its own loss in its own micro-batches."""
        trainer = self.trainer
        trainer.model.train()
        inputs = next(iter(trainer.get_train_dataloader()))
        waiting: dict[str, list[Sampled]] = {}
        for one in sampled:
            waiting.setdefault(one.example, []).append(one)
        ordered = [waiting[row["id"]].pop(0) for row in inputs]
        patched: dict[str, Any] = {
            "use_vllm": False,
            "_generate_single_turn": lambda *_, **__: ([list(one.token_ids) for one in ordered], None),
            "_calculate_rewards": lambda *_, **__: torch.zeros(len(ordered), 1, device=trainer.accelerator.device),
        }
        before = {name: trainer.__dict__.get(name) for name in patched}
        trainer.__dict__.update(patched)
        try:
            batch = trainer._generate_and_score_completions(inputs)
            batch["advantages"] = torch.tensor([one.advantage for one in ordered]).to(batch["advantages"])
            found = self._backward(batch, len(ordered))
        finally:
            for name, value in before.items():
                if value is None:
                    del trainer.__dict__[name]
                else:
                    trainer.__dict__[name] = value
            trainer.model.zero_grad()
            trainer.stopwatch.take()
            trainer.tokens = 0
        return found

    def _backward(self, batch: dict[str, Any], samples: int) -> dict[str, torch.Tensor]:
        from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

        trainer = self.trainer
        count = trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        parts: list[Any] = split_tensor_dict(cast(Any, split_pixel_values_by_grid(batch)), count)
        for part in parts:
            with trainer.compute_loss_context_manager():
                loss = trainer._compute_loss(trainer.model, unsplit_pixel_values_by_grid(part))
            loss.backward()
        gradients = {plain_name(name): p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        return {name: compared_part(gradients[name]) for name in compared_names(gradients)}

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
        self._trainer = self._scorer = None


class _EndedError(Exception):
    """Leaves TRL's loop."""


def trl_config(setting: Setting, own: Processor, folder: Path) -> GRPOConfig:
    """The paper's loss and our optimizer; whatever else is TRL's default, micro-batches of 8 among it."""
    on_gpu = torch.cuda.is_available()
    per_process = setting.samples // setting.processes
    micro_batch = min(MICRO_BATCH, per_process)
    held: dict[str, Any] = {"min_new_tokens": setting.length, "suppress_tokens": list(own.placeholder_ids)}
    engine: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    engine |= {"ddp_backend": "gloo"} if setting.processes > 1 else {}
    if on_gpu:
        bias = dict.fromkeys(own.placeholder_ids, -100.0)
        held = {"min_tokens": setting.length, "ignore_eos": True, "logit_bias": bias}
        engine = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": GPU_MEMORY,
            "vllm_max_model_length": LONGEST_SEQUENCE,
            "vllm_enable_sleep_mode": not setting.lora,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    return GRPOConfig(
        output_dir=str(folder),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        loss_type="grpo",
        beta=0.0,
        num_generations=setting.group,
        max_completion_length=setting.length,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_process // micro_batch,
        max_steps=1 << 20,
        shuffle_dataset=False,
        learning_rate=FROZEN,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        generation_kwargs=held,
        seed=0,
        **engine,
    )


def one_placeholder_an_image(ids: Sequence[int], mark: int) -> list[int]:
    """`ids` with one token `mark` where there is a run of them; images do not touch."""
    return [token for i, token in enumerate(ids) if token != mark or i == 0 or ids[i - 1] != mark]


def reward(scorer: Scorer, by_id: Mapping[str, Any]) -> Callable[..., Any]:
    """The sum of the three rewards; the judge has all completions of a batch at once."""
    tokenizer = scorer._tokenizer

    async def steps_reward(completion_ids: list[list[int]], id: list[str], **_: Any) -> list[float]:
        pending = []
        for name, ids in zip(id, completion_ids, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[attr-defined]
            pending.append(scorer.submit(by_id[name], Completion(tuple(ids), text, "length")))
        await asyncio.gather(*(asyncio.wrap_future(item.verdict) for item in pending))
        rewards = [item.rewards for item in scorer.collect(pending)]
        return [parts.answer + (parts.process or 0.0) + parts.length for parts in rewards]

    return steps_reward


def _processing_class(own: Processor, model: str) -> Any:
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(model, padding_side="left")
    made = PictureProcessor(own.image_processor, own.tokenizer, own.tokenizer.chat_template)
    made.own = own
    return made


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules=_LORA_TARGETS, task_type="CAUSAL_LM")
