"""What every way of a whole step can do, and what they share."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from step_setting import Setting

from mrpo.records import Completion, Example
from mrpo.scoring import PendingScore, Scorer

# About so many parameters have their gradients compared.
_COMPARED, _COMPARED_ROWS = 8, 1024


@dataclass(frozen=True)
class Sampled:
    """A completion of the example of this id, and its advantage."""

    example: str
    token_ids: tuple[int, ...]
    advantage: float


class Way(Protocol):
    """One way of training, in a process of its own or in several.

    Its steps are told by `seconds`, `NAME s` of stages, the completion `tokens` of this process, and how many of its
    completions were `judged`.
    """

    def prepare(self, setting: Setting, folder: Path) -> None:
        """Builds what a setting needs, in place of what was there."""

    def gradients(self, sampled: Sequence[Sampled]) -> Mapping[str, torch.Tensor]:
        """Gradients of some parameters by `plain_name`, of the mean over tokens, then completions; clipping aside."""

    def close(self) -> None: ...


class Stepping(Way, Protocol):
    """A way that takes a step when it is asked to."""

    def step(self, algorithm: str, index: int | None) -> dict[str, float]: ...


class CountingScorer(Scorer):
    """Knows how many completions it gave to the judge: one in which no sentence is found is judged without asking."""

    _asked = 0

    def submit(self, example: Example, completion: Completion) -> PendingScore:
        pending = super().submit(example, completion)
        self._asked += bool(pending.parsed.steps)
        return pending

    def take(self) -> float:
        """Completions given to the judge since the last call."""
        asked, self._asked = self._asked, 0
        return float(asked)


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers and adapters put around it."""
    for part in ("module.", "base_model.model.", ".default", ".base_layer"):
        name = name.replace(part, "")
    return name


def compared_part(gradient: torch.Tensor) -> torch.Tensor:
    """A copy of the first rows in fp32 on the host: the whole gradient of a large head would take gigabytes."""
    return gradient.detach()[:_COMPARED_ROWS].float().cpu().clone()


@torch.no_grad()
def same_adapters(model: torch.nn.Module) -> None:
    """Draws the A of every adapter anew, from its name: the ways make adapters in different orders and dtypes."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(plain_name(name).encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)


def compared_names(names: Iterable[str]) -> list[str]:
    """The last matrices of both towers and a few others. Of adapters B alone: A has no gradient while B is 0."""
    matrices = sorted(name for name in names if name.endswith(".weight") and ".lora_A" not in name)
    chosen = [name for name in matrices if "norm" not in name and "ln_" not in name]
    return chosen[:: max(1, len(chosen) // _COMPARED)]
