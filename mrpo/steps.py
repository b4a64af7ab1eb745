"""Reasoning steps of a completion: the sentences of its think block, with the tokens that write them.

The block begins after the first `<think_tag>`, or at the start of the text when that tag is missing or a closing tag
comes before it (some chat templates end the prompt with the opening tag). It ends at the closing tag that balances the
opening one, else at the first closing tag, but never beyond `<answer>` or the end of the text.

Sentences are sentencex's, which needs no model and knows the full stops of other scripts; besides, a line break ends a
sentence, a list label ("2.", "(b)", "Step 3:") belongs to the sentence after it, and a fragment without a letter or a
digit is no step. Tags and special tokens belong to no step and end the sentence they stand in.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import sentencex

from mrpo.offsets import TokenSpans, decode, token_spans
from mrpo.records import Step

ANSWER = "<answer>"
_ANSWER_TEXT = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", re.DOTALL)
_UNFINISHED_TAG = re.compile(r"</?\w*\Z")
_LABEL = re.compile(r"[\s*_#(\[-]*(?:step\s*)?(?:\d{1,3}|[a-z]|[ivx]{1,4})[\s.:)\]*_]*", re.IGNORECASE)
_CLOSERS = re.compile(r"[*_)\]\"'\u201d\u2019\u00bb]+(?=\s|\Z)")
# Abbreviations of reports that sentencex takes for the end of a sentence.
_ABBREVIATION = re.compile(
    r"\b(?:approx|bilat|cf|dept|dx|esp|excl|figs|hx|incl|pts?|refs?|resp|rx|segs?|sx|tx|vit|vol)\.\s*\Z", re.IGNORECASE
)


def find_steps(token_ids: Sequence[int], tokenizer: Any, *, think_tag: str) -> list[Step]:
    """The reasoning steps of a completion, in order, with exact and disjoint token spans.

    A token that writes any of a step's characters belongs to it; one that ends a step and begins the next belongs to
    the earlier, and a sentence left without a token of its own joins that step. White space belongs to the sentence
    after it, as in byte-level BPE's " The".

    Args:
        token_ids: (T,) the completion's own tokens, as sampled.
        tokenizer: any Hugging Face tokenizer.
        think_tag: the name of the tag, such as "think".
    """
    text = decode(token_ids, tokenizer)
    sentences = [
        sentence
        for start, end in _passages(text, _block(text, think_tag), _separators(think_tag, tokenizer))
        for sentence in _sentences(text, start, end)
    ]
    if not sentences:
        return []
    return _locate(sentences, text, token_spans(token_ids, tokenizer, text), len(token_ids))


def step_ids(steps: Sequence[Step], length: int) -> list[int]:
    """For each of `length` tokens the index of its step, or -1 outside every step."""
    ids = [-1] * length
    for index, step in enumerate(steps):
        ids[step.start : step.end] = [index] * (step.end - step.start)
    return ids


def extract_answer(text: str, *, think_tag: str) -> str | None:
    """What stands in the first `<answer>…</answer>` after the think block, stripped; None without an answer tag.

    The block ends at its first closing tag; without one an answer tag anywhere counts. An answer that is not closed
    reaches to the end of the text.
    """
    _, closed, after = text.partition(f"</{think_tag}>")
    text = after if closed else text
    found = _ANSWER_TEXT.search(text)
    if found is None:
        return None
    start, end = found.span(1)
    return text[start : _cut_unfinished(text, end, "</answer>")].strip()


def _block(text: str, think_tag: str) -> tuple[int, int]:
    opening, closing = f"<{think_tag}>", f"</{think_tag}>"
    opened, closed = text.find(opening), text.find(closing)
    start = 0 if opened < 0 or 0 <= closed < opened else opened + len(opening)
    answer = text.find(ANSWER, start)
    limit = len(text) if answer < 0 else answer
    depth = 1
    for tag in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text[start:limit]):
        depth += 1 if tag.group() == opening else -1
        if depth == 0:
            return start, start + tag.start()
    first_closing = text.find(closing, start, limit)
    if first_closing >= 0:
        return start, first_closing
    return start, limit if answer >= 0 else _cut_unfinished(text, limit, opening, closing, ANSWER)


def _cut_unfinished(text: str, end: int, *tags: str) -> int:
    """Where the text before `end` stops when it breaks off inside one of `tags`."""
    tail = _UNFINISHED_TAG.search(text, 0, end)
    return tail.start() if tail and any(tag.startswith(tail.group()) for tag in tags) else end


def _separators(think_tag: str, tokenizer: Any) -> re.Pattern[str]:
    specials = set(tokenizer.all_special_tokens)
    if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        specials.discard(tokenizer.unk_token)  # an unknown word does not end its sentence
    return _any_of(f"<{think_tag}>", f"</{think_tag}>", *sorted(specials, key=len, reverse=True))


@lru_cache(maxsize=64)
def _any_of(*strings: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)))


def _passages(text: str, block: tuple[int, int], separators: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The character ranges of the block between inner tags and special tokens."""
    position, end = block
    for separator in separators.finditer(text, position, end):
        yield position, separator.start()
        position = separator.end()
    yield position, end


def _sentences(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The character ranges of the sentences in text[start:end], without surrounding white space."""
    found: list[tuple[int, int]] = []
    begun = -1  # where a label or an abbreviation has begun the sentence
    for line in _lines(text, start, end):
        spans = [span for span in line if any(map(str.isalnum, text[slice(*span)]))]
        for first, last in spans:
            is_label = begun < 0 and _LABEL.fullmatch(text, first, last)
            # At the end of a line an abbreviation ends its sentence; a label belongs to the next line.
            is_open = is_label or (last != spans[-1][1] and _ABBREVIATION.search(text, first, last))
            if begun < 0:
                begun = first
            if not is_open:
                found.append((begun, last))
                begun = -1
    if begun >= 0:  # nothing follows a label at the end: it joins the sentence before it
        found.append((found.pop()[0] if found else begun, len(text[:end].rstrip())))
    return [(last - len(text[first:last].lstrip()), len(text[:last].rstrip())) for first, last in found]


def _lines(text: str, start: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """The character ranges that sentencex finds in each line, with closing marks left to the sentence they close."""
    for line in text[start:end].splitlines(keepends=True):
        # sentencex 1.0 takes a space for one byte and panics where it is longer, so it sees only plain ones.
        pieces = sentencex.segment("en", re.sub(r"\s", " ", line))
        first = cut = 0
        found = []
        for piece in pieces:
            cut += len(piece)
            closers = _CLOSERS.match(line, cut)
            last = closers.end() if closers else cut
            if last > first:
                found.append((start + first, start + last))
            first = max(first, last)
        yield found
        start += len(line)


def _locate(sentences: Sequence[tuple[int, int]], text: str, spans: TokenSpans, length: int) -> list[Step]:
    steps: list[Step] = []
    used = previous = 0  # tokens and characters that earlier steps have taken
    for first, last in sentences:
        space = previous + len(text[previous:first].rstrip())  # where the white space before the sentence begins
        start = bisect_right(range(length), first, lo=used, key=spans.end)
        while start > used and spans.begin(start - 1) >= space:
            start -= 1
        stop = bisect_left(range(length), last, lo=start, key=spans.begin)
        if stop > start:
            steps.append(Step(text[first:last], start, stop))
        else:
            earlier = steps.pop()
            steps.append(Step(f"{earlier.text} {text[first:last]}", earlier.start, earlier.end))
        used, previous = max(used, stop), last
    return steps
