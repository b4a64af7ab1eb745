"""What a variable-length flash-attention kernel computes, in plain PyTorch and any precision."""

from __future__ import annotations

from itertools import pairwise

import torch

from mrpo.kernels.prefix_layout import Spans


class PlainVarlen:
    """What flash attention computes, in the order of its mathematics; queries without keys get a false LSE of +inf."""

    def forward(self, q, k, v, spans, *, causal, scale):
        out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), float("inf"))
        for rows, columns in span_pairs(spans):
            if rows.stop > rows.start and columns.stop > columns.start:
                scores, values = self.scores(q, k, v, rows, columns, causal, scale)
                lse[:, rows] = scores.logsumexp(-1)
                out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, spans, *, causal, scale):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shared = q.shape[1] // k.shape[1]
        for rows, columns in span_pairs(spans):
            if rows.stop > rows.start and columns.stop > columns.start:
                scores, values = self.scores(q, k, v, rows, columns, causal, scale)
                p = (scores - lse[:, rows, None]).exp()
                do = grad_out[rows].transpose(0, 1)
                delta = (do * out[rows].transpose(0, 1)).sum(-1, keepdim=True)
                ds = p * (do @ values.transpose(1, 2) - delta) * scale
                dq[rows] = (ds @ self.repeated(k[columns], shared)).transpose(0, 1)
                dk[columns] = self.summed(ds.transpose(1, 2) @ q[rows].transpose(0, 1), shared)
                dv[columns] = self.summed(p.transpose(1, 2) @ do, shared)
        return dq, dk, dv

    def scores(self, q, k, v, rows, columns, causal, scale):
        shared = q.shape[1] // k.shape[1]
        scores = q[rows].transpose(0, 1) @ self.repeated(k[columns], shared).transpose(1, 2) * scale
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores, self.repeated(v[columns], shared)

    def repeated(self, tokens, times):
        return tokens.transpose(0, 1).repeat_interleave(times, 0)

    def summed(self, gradient, shared):
        return gradient.unflatten(0, (-1, shared)).sum(1).transpose(0, 1)


def span_pairs(spans: Spans):
    for ends in (spans.queries.tolist(), spans.keys.tolist()):
        assert ends[0] == 0
        assert ends == sorted(ends)
    queries, keys = pairwise(spans.queries.tolist()), pairwise(spans.keys.tolist())
    return [(slice(*rows), slice(*columns)) for rows, columns in zip(queries, keys, strict=True)]
