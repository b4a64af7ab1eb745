"""The order of a run: steps, evaluations, checkpoints, the exported policy, and the end that a signal asks for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from thread_processes import Meeting, ThreadRuntime

from mrpo.batching import Row
from mrpo.checkpoint import TrainerState
from mrpo.errors import UserError
from mrpo.passes import Pass
from mrpo.policy import Policy
from mrpo.records import EncodedPrompt
from mrpo.scoring import UnjudgedError
from mrpo.settings import load_config
from mrpo.trainer import Trainer
from mrpo.update_stats import PassResult


class Recorder:
    """Stands for policy, checkpoints and log, and writes down what is asked of them."""

    engine = None
    packing = "dense"

    def __init__(self) -> None:
        self.events: list[str] = []

    def export(self, folder: Path) -> None:
        self.events.append(f"export {folder.name}")

    def save(self, engine: None, state: TrainerState, tensors: dict[str, torch.Tensor]) -> None:
        self.events.append(f"save {state.step}")

    def load_tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {}

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.events.append(f"log {step}{' with validation' if 'validation/reward' in metrics else ''}")

    def sleep(self) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        self.events.append("evaluate")
        return {"validation/reward": 1.0}


class EmptySteps(Trainer):
    def _rl_step(self, step: int) -> dict[str, float]:
        return {"loss": 0.0}


class UnjudgedSteps(EmptySteps):
    """The judge fails in step 2."""

    def _rl_step(self, step: int) -> dict[str, float]:
        if step == 1:
            raise UnjudgedError("the judge is gone")
        return super()._rl_step(step)


def never(_: Recorder) -> bool:
    return False


def run(runtime: Any, stop: Callable[[Recorder], bool], start: int, *overrides: str) -> tuple[bool, list[str]]:
    """Whether a run of 3 steps went to its end, and what it did on the way."""
    recorder = Recorder()
    return make_trainer(recorder, runtime, stop, *overrides).run(start), recorder.events


def make_trainer(
    recorder: Any, runtime: Any, stop: Callable[[Recorder], bool], *overrides: str, kind: type[Trainer] = EmptySteps
) -> Trainer:
    return kind(
        config=load_config(None, list(overrides)),
        runtime=runtime,
        policy=recorder,
        engine=recorder,
        scorer=recorder,
        train_set=(),
        checkpoints=recorder,
        log=recorder,
        total_steps=3,
        evaluate=recorder.evaluate,
        stop_requested=lambda: stop(recorder),
    )


def one_process() -> ThreadRuntime:
    return ThreadRuntime(0, Meeting(1), torch.device("cpu"))


def alone(stop: Callable[[Recorder], bool], *overrides: str, start: int = 0) -> tuple[bool, list[str]]:
    return run(one_process(), stop, start, *overrides)


def when(event: str) -> Callable[[Recorder], bool]:
    """Asks to stop from `event` on."""
    return lambda recorder: event in recorder.events


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_the_last_step_is_saved_after_the_policy_is_exported(every: int) -> None:
    saves = {step: [f"save {step}"] for step in (1, 2) if every and step % every == 0}
    steps = ["log 1", *saves.get(1, []), "log 2", *saves.get(2, []), "log 3"]
    assert alone(never, f"checkpoint.every={every}") == (True, [*steps, "export policy", "save 3"])


@pytest.mark.parametrize(("start", "saved"), [(0, ["log 1", "save 1"]), (1, [])])
def test_a_step_without_its_verdicts_leaves_the_steps_before_it(start: int, saved: list[str]) -> None:
    """A run that was continued has the checkpoint that it began from."""
    recorder = Recorder()
    trainer = make_trainer(recorder, one_process(), never, "checkpoint.every=0", kind=UnjudgedSteps)
    with pytest.raises(UnjudgedError):
        trainer.run(start)
    assert recorder.events == saved


def test_an_evaluation_without_its_verdicts_leaves_the_step_before_it() -> None:
    class Unjudged(Recorder):
        def evaluate(self) -> dict[str, float]:
            raise UnjudgedError("the judge is gone")

    recorder = Unjudged()
    trainer = make_trainer(recorder, one_process(), never, "checkpoint.every=0", "eval.every=2")
    with pytest.raises(UnjudgedError):
        trainer.run(0)
    assert recorder.events == ["log 1", "log 2", "save 2"]


class Engine:
    """As one in the trainer's process: new weights wake it."""

    awake = True

    def sleep(self) -> None:
        self.awake = False

    def sync(self, weights: Any) -> None:
        self.awake = True


def test_an_engine_sleeps_in_updates_and_in_the_export_whatever_woke_it() -> None:
    """Where a step samples nothing, as the last ones with rollout.ahead, nothing else would put it to sleep."""
    engine, asleep = Engine(), []

    class Policy(Recorder):
        weights = None

        def update_in_parts(self, parts: Any, lr: float) -> Any:
            asleep.append(not engine.awake)
            return SimpleNamespace(messages=[])

        def export(self, folder: Path) -> None:
            asleep.append(not engine.awake)

    class Steps(Trainer):
        def _rl_step(self, step: int) -> dict[str, float]:
            self._update([], [], 0.1, step)
            return {"loss": 0.0}

    policy: Any = Policy()
    runtime: Any = one_process()
    others: Any = {"scorer": policy, "train_set": (), "checkpoints": policy, "log": policy}
    config, sampler = load_config(None, []), cast(Any, engine)
    Steps(config, runtime, policy, sampler, **others, total_steps=2, evaluate=dict, stop_requested=lambda: False).run(0)
    assert asleep == [True] * 3


def test_a_finished_run_that_is_resumed_exports_again_and_saves_nothing() -> None:
    assert alone(never, start=3) == (True, ["export policy"])
    assert alone(never, "checkpoint.export=false", start=3) == (True, [])


def test_a_run_that_is_to_stop_saves_and_does_not_evaluate_first() -> None:
    settings = ("checkpoint.every=0", "eval.every=2")
    assert alone(when("log 1"), *settings) == (False, ["log 1", "log 2", "save 2"])


def test_a_run_that_is_asked_to_stop_while_it_evaluates_saves_then() -> None:
    done = alone(when("evaluate"), "checkpoint.every=0", "eval.every=2")
    assert done == (False, ["log 1", "evaluate", "log 2 with validation", "save 2"])


def test_a_run_that_is_asked_to_stop_in_its_last_step_saves_at_once() -> None:
    assert alone(when("log 2"), "checkpoint.every=0") == (False, ["log 1", "log 2", "log 3", "save 3"])


@pytest.mark.parametrize("event", ["log 1", "evaluate", "log 2 with validation"])
def test_processes_stop_together_whichever_was_asked(event: str) -> None:
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        parts = [
            pool.submit(run, ThreadRuntime(rank, meeting, torch.device("cpu")), stop, 0, "eval.every=2")
            for rank, stop in enumerate((when(event), never))
        ]
        first, second = (part.result() for part in parts)
    assert first == second
    assert not first[0]


def test_the_process_whose_loss_is_not_finite_saves_its_inputs_and_all_name_its_file(tmp_path: Path) -> None:
    prompt = EncodedPrompt(torch.tensor([3, 4]), torch.zeros(2), {}, (3, 4), ())
    passed = Pass((Row(prompt, (5, 6), torch.ones(2), torch.ones(2)),), (0,), packed=False)
    meeting = Meeting(2)

    def error(rank: int, loss: float) -> str:
        runtime: Any = ThreadRuntime(rank, meeting, torch.device("cpu"))
        policy = Policy.__new__(Policy)
        policy._runtime = runtime
        result = PassResult(1, torch.tensor(loss), *[torch.empty(0)] * 4)

        class Steps(Trainer):
            def _rl_step(self, step: int) -> dict[str, float]:
                self._update([], [], 0.1, step)
                return {}

        recorder: Any = Recorder()
        recorder.update_in_parts = lambda parts, lr: policy._require_finite([(passed, result)])
        with pytest.raises(UserError) as caught:
            make_trainer(recorder, runtime, never, f"output_dir={tmp_path}", kind=Steps).run(0)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        told = [pool.submit(error, rank, loss) for rank, loss in enumerate((0.5, float("nan")))]
        file = tmp_path / "nonfinite-step1-rank1.pt"
        assert {part.result() for part in told} == {f"step 1: the loss is not finite; the step's inputs are in {file}"}
    assert list(tmp_path.iterdir()) == [file]
    assert torch.load(file, weights_only=True)[0]["token_ids"].tolist() == [5, 6]
