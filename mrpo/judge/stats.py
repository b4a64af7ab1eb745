"""What an endpoint costs in time and money, as metrics of a step."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Of several processes: the mean, or the largest; whatever is not named here is a sum.
_MEANS = ("judge/wait_s", "judge/busy_s", "judge/serial_s", "judge/latency_p50", "judge/without_gold")
_LARGEST = ("judge/latency_p95", "judge/latency_max")


class Tally:
    """Counts and latencies, gathered by one thread and taken by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._spans: list[tuple[float, float]] = []

    def add(self, **amounts: float) -> None:
        """Adds to the counts of these names."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def took(self, began: float, ended: float) -> None:
        """One request was under way from `began` to `ended`, in seconds of one clock."""
        with self._lock:
            self._spans.append((began, ended))

    def take(self, names: Iterable[str]) -> dict[str, float]:
        """judge/NAME of `names`, 0 where nothing was counted, and the times of the requests that ended since.

        judge/latency_p50, _p95, _max: seconds of a request with its tries, waits and repair, without its wait for a
        free place (`judge.concurrency`); judge/serial_s: their sum, what a judge asked one by one would have taken;
        judge/busy_s: seconds in which at least one was under way.
        """
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
            spans, self._spans = self._spans, []
        metrics = {f"judge/{name}": counts[name] for name in names}
        latencies = np.array([ended - began for began, ended in spans])
        metrics |= {"judge/serial_s": float(latencies.sum()), "judge/busy_s": covered(spans)}
        if spans:
            p50, p95, largest = np.quantile(latencies, (0.5, 0.95, 1.0)).tolist()
            metrics |= {"judge/latency_p50": p50, "judge/latency_p95": p95, "judge/latency_max": largest}
        return metrics


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals (begin, end)."""
    total, reached = 0.0, -math.inf
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total


def overlap(metrics: Mapping[str, float]) -> dict[str, float]:
    """How much of the judge's time nobody waited for; empty if the judge took none.

    judge/hidden = 1 - wait_s / busy_s: the share of the time with a verdict under way in which the trainer did
    something else. judge/overlapped = 1 - wait_s / serial_s: the share of all requests' time that was hidden behind
    the trainer's work or ran beside another request.
    """
    wait = metrics["judge/wait_s"]
    shares = {"judge/hidden": metrics.get("judge/busy_s", 0.0), "judge/overlapped": metrics.get("judge/serial_s", 0.0)}
    return {name: max(0.0, 1.0 - wait / seconds) for name, seconds in shares.items() if seconds > 0.0}


def merge_stats(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all processes from those of each: counts and costs are summed, seconds averaged."""
    names = dict.fromkeys(name for part in parts for name in part if name not in ("judge/hidden", "judge/overlapped"))
    merged = {}
    for name in names:
        values = [part[name] for part in parts if name in part]
        if name in _LARGEST:
            merged[name] = max(values)
        else:
            merged[name] = math.fsum(values) / (len(values) if name in _MEANS else 1)
    return merged | (overlap(merged) if "judge/wait_s" in merged else {})
