"""What the prompts of a run ask of an engine, found out before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mrpo.backbones import Processor
from mrpo.records import Example

_CHUNK = 128


@dataclass(frozen=True)
class PromptSizes:
    """The largest prompt and the most images in one."""

    max_tokens: int = 0
    max_images: int = 0

    def __or__(self, other: PromptSizes) -> PromptSizes:
        return PromptSizes(max(self.max_tokens, other.max_tokens), max(self.max_images, other.max_images))


def check_prompt_lengths(
    examples: Sequence[Example],
    processor: Processor,
    indices: Iterable[int] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> PromptSizes:
    """Refuses what would stop a run half way: prompts above the limit, images that are missing or are none.

    Of an image file only the header is read, by several threads.

    Args:
        indices: the examples that will be used; default: all of them.
        progress: told how many examples were looked at since the last call.

    Raises:
        UserError: names the first example in the order of `indices` that cannot be used.
    """
    chosen = list(range(len(examples)) if indices is None else dict.fromkeys(indices))
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]

    def look(chunk: list[int]) -> PromptSizes:
        sizes = PromptSizes()
        for example in map(examples.__getitem__, chunk):
            sizes |= PromptSizes(processor.count_prompt_tokens(example), len(example.images))
        return sizes

    sizes = PromptSizes()
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for chunk, found in zip(chunks, pool.map(look, chunks), strict=True):
            sizes |= found
            progress(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    return sizes
