"""What the study runs: its arms, its cells, its sizes. Nothing here looks at a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrpo.data.phantom.scene import Split


@dataclass(frozen=True)
class Arm:
    """A method, or a change to one: the fields that it sets (a learning rate instead of the tuned one, too), and what
    errs in its judge."""

    name: str
    overrides: tuple[str, ...]
    flipped: float = 0.0  # share of steps whose verdict is turned round
    missing: float = 0.0  # share of completions without a verdict
    tuned_as: str = ""  # the method whose learning rate it takes; its own name if empty

    @property
    def method(self) -> str:
        return self.tuned_as or self.name


def _mrpo(name: str, *overrides: str, **judge: Any) -> Arm:
    return Arm(name, ("algorithm=mrpo", *overrides), tuned_as="MRPO", **judge)


def _telescoped(name: str, *overrides: str, **judge: Any) -> Arm:
    return Arm(name, ("algorithm=mrpo", "advantage.credit=telescoped", *overrides), tuned_as="telescoped", **judge)


BASE = "base"
METHODS: tuple[Arm, ...] = (
    Arm("SFT", ("algorithm=sft",)),
    # As many questions as the methods below see, and the same: theirs are 16 with 8 completions each.
    Arm("SFT, 16 a step", ("algorithm=sft", "optim.batch_size=16")),
    Arm("GRPO", ("algorithm=grpo",)),
    Arm("GDPO", ("algorithm=gdpo",)),
    Arm("MRPO", ("algorithm=mrpo",)),
    Arm("telescoped", ("algorithm=mrpo", "advantage.credit=telescoped")),
)
# Those that learn from completions of their own.
SAMPLING = tuple(arm for arm in METHODS if "algorithm=sft" not in arm.overrides)
ABLATIONS: tuple[Arm, ...] = (
    _mrpo("linear penalty", "advantage.penalty=linear"),
    _mrpo("constant penalty", "advantage.penalty=none"),
    _mrpo("reversed penalty", "advantage.penalty=reversed"),
    _mrpo("tau 0.4", "advantage.tau=0.4"),
    _mrpo("tau 1: right answers shaped too", "advantage.tau=1.0"),
    _mrpo("no length reward", "reward.length_weight=0"),
    _mrpo("KL 0.04", "loss.beta=0.04"),
    _mrpo("10 % of verdicts flipped", flipped=0.1),
    _mrpo("20 % of verdicts flipped", flipped=0.2),
    _mrpo("30 % of verdicts flipped", flipped=0.3),
    _mrpo("25 % unjudged", "judge.max_unjudged=1.0", missing=0.25),
    _mrpo("50 % unjudged", "judge.max_unjudged=1.0", missing=0.5),
    # Added when the results were known, to see whether the tuned rate of telescoped credit (2e-4) is what harms it.
    _telescoped("telescoped at 1e-4", "optim.lr=1e-4"),
    _telescoped("telescoped, 30 % flipped", flipped=0.3),
    _telescoped("telescoped, 50 % unjudged", "judge.max_unjudged=1.0", missing=0.5),
)
# Those ablations whose shaping is compared with the true effects of steps: the others share MRPO's.
CREDITED = ("linear penalty", "constant penalty", "reversed penalty", "tau 1: right answers shaped too")


@dataclass(frozen=True)
class Plan:
    """Sizes. A cell is a warm start and a seed that no other cell has, so cells are independent of each other; each
    method runs once in each. A step is 128 completions; `perceive` and `err` are the SFT steps that make a warm start.

    `ablation_cells`: the first so many; an ablation is compared with its method in the same ones.
    `held_out` is the split of the final questions: a trial run leaves the test split alone.
    """

    cells: int
    ablation_cells: int
    steps: int
    perceive: int
    err: int
    questions: int
    shifted_questions: int
    sampled: int
    tuning_questions: int
    rates: tuple[float, ...]
    credit_prompts: int
    continuations: int
    held_out: Split = "test"
    ablations: tuple[Arm, ...] = field(default=ABLATIONS)
