"""Runs passes one after the other; one that runs out of device memory is split in two and tried once more.

Processes can disagree on the number of passes only where nothing is communicated inside of one: not in an update under
ZeRO-2 and 3, and not under ZeRO-3 in log-probabilities. There the run ends and names the limit to lower.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from mrpo.errors import UserError
from mrpo.passes import Pass, Planner

T = TypeVar("T")


class PassRunner:
    """Runs the passes of one planner. `messages` are for the run's log, `splits` counts the passes that were split."""

    def __init__(self, planner: Planner, zero_stage: int) -> None:
        self._planner = planner
        self._zero_stage = zero_stage
        self.messages: list[str] = []
        self.splits = 0

    def run(self, passes: Sequence[Pass], run: Callable[[Pass], T]) -> list[tuple[Pass, T]]:
        """What `run` gives for each pass, without gradients.

        Raises:
            UserError: a pass that does not fit the memory cannot be split, or its half does not fit either.
        """
        source = ((passed, False) for passed in passes)
        return self._run(source, lambda passed, _: run(passed), undo=lambda: False, can_split=self._zero_stage < 3)

    def accumulate(
        self, passes: Iterable[tuple[Pass, bool]], engine: Any, forward: Callable[[Pass], tuple[torch.Tensor, T]]
    ) -> list[tuple[Pass, T]]:
        """What `forward` gives beside the loss of each pass, whose gradients are summed in a DeepSpeed engine.

        A pass comes with whether it is the last, and is asked for when the one before it is done.

        Where a backward pass was interrupted, the gradients of all passes are discarded and computed anew: what it left
        behind cannot be told from the rest.

        Raises:
            UserError: as `run`.
        """
        is_torn = False

        def run(passed: Pass, is_last: bool) -> T:
            nonlocal is_torn
            engine.set_gradient_accumulation_boundary(is_last)
            loss, values = forward(passed)
            is_torn = True
            engine.backward(loss)
            is_torn = False
            return values

        def undo() -> bool:
            nonlocal is_torn
            was_torn, is_torn = is_torn, False
            if was_torn:
                discard_gradients(engine)
            return was_torn

        return self._run(passes, run, undo=undo, can_split=self._zero_stage < 2)

    def _run(
        self,
        source: Iterable[tuple[Pass, bool]],
        run: Callable[[Pass, bool], T],
        *,
        undo: Callable[[], bool],
        can_split: bool,
    ) -> list[tuple[Pass, T]]:
        """`run` is told whether a pass is the last; `undo` says whether it has undone all passes so far."""
        done: list[tuple[Pass, T]] = []
        for whole, is_last in source:
            queue = deque([(whole, False)])
            while queue:
                passed, is_half = queue.popleft()
                try:
                    done.append((passed, run(passed, is_last and not queue)))
                    continue
                except torch.OutOfMemoryError as error:
                    reason = str(error).splitlines()[0]
                # The exception held the frames of the pass, and with them its tensors.
                get_accelerator().empty_cache()
                halves = passed.halves()
                if is_half or halves is None or not can_split:
                    raise UserError(self._refusal(passed, reason, can_split=can_split))
                self._planner.shrink(halves)
                self.splits += 1
                split = f"a pass of {passed.tokens:,} tokens did not fit the memory and was split: {reason}"
                self.messages.append(split)
                queue.extendleft((half, True) for half in reversed(halves))
                if undo():
                    queue.extendleft((earlier, False) for earlier, _ in reversed(done))
                    done.clear()
        return done

    def _refusal(self, passed: Pass, reason: str, *, can_split: bool) -> str:
        why = "" if can_split else f", and deepspeed.zero_stage={self._zero_stage} does not allow to split it midway"
        limit = "update.token_budget" if passed.packed else "optim.micro_batch_size"
        mend = f"lower {limit}, " if len(passed.rows) > 1 else ""
        return (
            f"a pass of {passed.tokens:,} tokens does not fit the memory{why}; {mend}set update.checkpointing=all, or "
            f"shorten prompt.max_tokens or rollout.max_tokens ({reason})"
        )


def discard_gradients(engine: Any) -> None:
    """Forgets what the passes since the last step left in an engine of ZeRO 0 or 1, also if one was interrupted."""
    for parameter in engine.module.parameters():
        parameter.grad = None
    if hasattr(engine.optimizer, "zero_grad"):
        engine.optimizer.zero_grad()
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):  # a ZeRO optimizer, which counts hooks of a backward pass
        engine.optimizer._backward_active_depth = 0
        engine.optimizer.clear_backward_seen_flag()
