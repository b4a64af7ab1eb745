"""Which characters of a completion each of its tokens writes.

The text is `tokenizer.decode` of all tokens; nothing is ever tokenised again. A token may write part of a character
(byte-level BPE), white space that the decoder invents (word-level), or nothing at all, so there are three ways to
find its characters. Each checks itself against the decoded text, and the last one holds for any tokenizer:

- bytes: the vocabulary spells bytes (GPT-2's alphabet); their concatenation decodes to the text;
- surfaces: each token's own spelling follows the last one, white space aside (word-level, WordPiece, SentencePiece);
- prefixes: the text that the first i tokens or fewer decode to, up to where it departs from the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np


class TokenSpans(NamedTuple):
    """Token i writes the characters [begin(i), end(i)) of the text, at least in part.

    Both are monotone in i. Tokens that share a split character all contain it; a token that writes nothing contains
    the character that comes next.
    """

    begin: Callable[[int], int]
    end: Callable[[int], int]


def decode(token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text of `token_ids` as written: special tokens kept, white space not cleaned up."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_spans(token_ids: Sequence[int], tokenizer: Any, text: str) -> TokenSpans:
    """The character span in `text` of each token.

    Args:
        token_ids: the completion's own tokens.
        tokenizer: any Hugging Face tokenizer.
        text: `decode(token_ids, tokenizer)`.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(token_ids))]
    return _byte_spans(tokens, text) or _surface_spans(tokens, text) or _prefix_spans(token_ids, tokenizer, text)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_BYTE_OF = {ord(char): chr(byte) for byte, char in _byte_alphabet().items()}


@lru_cache(maxsize=1 << 18)
def _token_bytes(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # an added token that is not spelled in bytes
        return token.encode()


def _byte_spans(tokens: Sequence[str], text: str) -> TokenSpans | None:
    pieces = [_token_bytes(token) for token in tokens]
    data = b"".join(pieces)
    if data.decode(errors="replace") != text:
        return None
    char_of = [*_char_of_byte(data).tolist(), len(text)]
    stops = list(accumulate(map(len, pieces)))
    begins = [char_of[stop - len(piece)] for stop, piece in zip(stops, pieces, strict=True)]
    ends = [
        char_of[stop - 1] + 1 if piece else begin + 1 for stop, piece, begin in zip(stops, pieces, begins, strict=True)
    ]
    return TokenSpans(begins.__getitem__, ends.__getitem__)


def _char_of_byte(data: bytes) -> np.ndarray:
    """(len(data),) int64: the index of the character that each byte writes when errors are replaced by U+FFFD."""
    starts = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    position = 0
    while True:
        try:
            data[position:].decode()
        except UnicodeDecodeError as error:
            bad = slice(position + error.start, position + error.end)
            starts[bad] = False
            starts[bad.start] = True
            position = bad.stop
        else:
            return np.cumsum(starts) - 1


def _surface_spans(tokens: Sequence[str], text: str) -> TokenSpans | None:
    bounds = [0]
    for token in tokens:
        surface = token.replace("\u2581", " ").removeprefix("##").strip()
        position = bounds[-1]
        if surface:
            while text[position : position + 1].isspace():
                position += 1
            if not text.startswith(surface, position):
                return None
        bounds.append(position + len(surface))
    if text[bounds[-1] :].strip():
        return None
    return TokenSpans(bounds.__getitem__, lambda i: max(bounds[i + 1], bounds[i] + 1))


def _prefix_spans(token_ids: Sequence[int], tokenizer: Any, text: str) -> TokenSpans:
    """Lazy, since only the ends of steps are asked for: an answer costs a decode, amid byte tokens one for each."""

    @cache
    def prefix(count: int) -> str:
        return decode(token_ids[:count], tokenizer)

    @cache
    def shared(count: int) -> int:
        return _shared_length(prefix(count), text)

    def begun(count: int) -> bool:
        """Whether the first `count` tokens have begun a character that they have not finished."""
        return shared(count) < len(prefix(count))

    @cache
    def finished(count: int) -> int:
        """How many characters the first `count` tokens have finished.

        A run of byte tokens decodes as a whole. One that ends amid a character turns those before it into U+FFFD, which
        shorter prefixes had finished; so these are asked, too, back to one that is beyond doubt.
        """
        most = shared(count)
        while begun(count) or prefix(count).endswith("\ufffd"):
            count -= 1
            most = max(most, shared(count))
        return most

    def end(i: int) -> int:
        return max(finished(i + 1) + begun(i + 1), finished(i) + 1)

    return TokenSpans(finished, end)


def _shared_length(prefix: str, text: str) -> int:
    """How many leading characters the two strings share."""
    if text.startswith(prefix):
        return len(prefix)
    pairs = enumerate(zip(prefix, text, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prefix), len(text)))
