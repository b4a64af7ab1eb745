"""What the linear operators share: chunks of logits in one reused buffer, and products in the right precision.

N tokens, H hidden size, V vocabulary. A product of all tokens costs 2NHV FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .checks import check_tensor, require

# Leading dimensions that are multiples of 16 bytes keep matrix products on their fast path; 151,674 is not one.
_ALIGNMENT = 8
CHUNK_ROWS = 4096


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse hidden states, weight and bias that do not fit each other; the message names the argument."""
    require(hidden.dim() == 2, f"hidden must have shape (N, H), not {tuple(hidden.shape)}")
    require(weight.dim() == 2, f"weight must have shape (V, H), not {tuple(weight.shape)}")
    check_tensor("hidden", hidden, tuple(hidden.shape), hidden.device)
    check_tensor("weight", weight, (weight.shape[0], hidden.shape[1]), hidden.device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), hidden.device)
    same = hidden.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    require(
        same or torch.is_autocast_enabled(hidden.device.type),
        f"hidden ({hidden.dtype}), weight ({weight.dtype}) and bias must have one dtype outside autocast",
    )


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def plan_chunks(
    rows: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    trained: bool,
    chunk_rows: int | None = None,
    sum_dtype: torch.dtype | None = None,
) -> tuple[int, torch.dtype]:
    """How many rows of logits to hold at once, and the dtype in which the gradient of a `trained` weight is summed.

    One chunk needs no sum: its product rounds fp32 sums to the weight's dtype itself. Several need one in fp32 beside
    the logits; one chunk that takes no more memory than both is taken instead. `chunk_rows` and `sum_dtype` overrule.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if chunk_rows is None:
        needs_sum = trained and sum_dtype is None and wide != dtype
        spared = hidden_size * wide.itemsize // dtype.itemsize if needs_sum else 0
        chunk_rows = max(rows, 1) if rows <= CHUNK_ROWS + spared else CHUNK_ROWS
    return chunk_rows, sum_dtype or (dtype if rows <= chunk_rows else wide)


def logit_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits of successive rows, [n, V] each. Every chunk overwrites the one before it."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    width = -(-vocab // _ALIGNMENT) * _ALIGNMENT
    buffer = hidden.new_empty(min(rows, chunk_rows), width)
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        logits = buffer[: part.stop - part.start, :vocab]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits


class WeightGradient:
    """The sum over chunks of dlogits^T @ hidden, [V, H] in `dtype`."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.total = torch.empty_like(weight, dtype=dtype)
        self._started = False

    def add(self, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds the product of one chunk: dlogits [n, V], hidden [n, H]."""
        left, total = dlogits.t(), self.total
        if total.dtype == dlogits.dtype:
            torch.addmm(total, left, hidden, beta=float(self._started), out=total)
        elif total.is_cuda and self._started:
            torch.addmm(total, left, hidden, out_dtype=total.dtype, out=total)
        elif total.is_cuda:
            torch.mm(left, hidden, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left.to(total.dtype), hidden.to(total.dtype), beta=float(self._started), out=total)
        self._started = True

    def result(self) -> torch.Tensor:
        """The sum; zero if there was no chunk."""
        return self.total if self._started else self.total.zero_()
