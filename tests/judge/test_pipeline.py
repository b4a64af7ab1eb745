"""Thousands of completions through cache and client to a real HTTP server with every fault at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from judge_server import Answer, DrippedError, DroppedError, JudgeServer, completion, verdict
from judging import judge_config

from mrpo.judge.cache import CachedJudge, VerdictCache
from mrpo.judge.endpoint import Endpoint
from mrpo.judge.openai_client import OpenAIJudge
from mrpo.records import Example, JudgeRequest, StepVerdict, Unjudged, Verdict

TOTAL = 2048
CONCURRENCY = 64

Fault = Callable[[JudgeServer], Answer]


def drop(server: JudgeServer) -> Answer:
    raise DroppedError(b"HTTP/1.0 200 OK\r\nContent-Length: 50\r\n\r\n{")


def drip(server: JudgeServer) -> Answer:
    raise DrippedError


def hang(server: JudgeServer) -> Answer:
    server.closing.wait(120)
    return 500, {}, ""


# Name: how many requests have it, how often each meets it, and what it is.
FAULTS: dict[str, tuple[int, int, Fault]] = {
    "rate limit": (200, 1, lambda server: (429, {"Retry-After": "1"}, "{}")),
    "server error": (100, 2, lambda server: (500, {}, "<html>oops</html>")),
    "overload": (100, 1, lambda server: (503, {"retry-after-ms": "20"}, "{}")),
    "garbage": (100, 1, lambda server: completion("I think that all of them are fine.")),
    "not JSON": (60, 1, lambda server: (200, {}, "<html>")),
    "refusal": (60, 1, lambda server: completion(None, message={"refusal": "I cannot."})),
    "wrong count": (60, 1, lambda server: completion('{"steps": []}')),
    "dropped": (100, 1, drop),
    "drip": (12, 1, drip),
    "hang": (12, 1, hang),
    "always garbage": (20, 99, lambda server: completion("valid")),
    "always broken": (20, 99, lambda server: (502, {}, "")),
}


def faults_of(requests: int, draw: random.Random) -> list[str | None]:
    """Of each request the name of its fault; None: it has none."""
    names: list[str | None] = [name for name, (count, _, _) in FAULTS.items() for _ in range(count)]
    names += [None] * (requests - len(names))
    draw.shuffle(names)
    return names


def make_requests(faults: list[str | None]) -> list[JudgeRequest]:
    """Groups of eight completions of a question, each with steps of its own."""
    examples = [Example(f"{n}", (), f"q{n}", "mass", "A mass.", "train") for n in range(len(faults) // 8)]
    return [
        JudgeRequest(examples[i // 8], tuple(f"completion {i} step {k}" for k in range(i % 7 + 1)), "mass")
        for i in range(len(faults))
    ]


def expected(request: JudgeRequest) -> Verdict:
    return Verdict(tuple(StepVerdict(k % 2 == 0, False, step) for k, step in enumerate(request.steps)))


def test_nothing_is_lost_and_nothing_judged_twice(server: JudgeServer, tmp_path: Path) -> None:
    draw = random.Random(0)
    faults = faults_of(TOTAL, draw)
    latencies = [min(draw.lognormvariate(-6.0, 1.0), 0.2) for _ in faults]  # seconds; median 2.5 ms
    tries: Counter[int] = Counter()

    def script(record: dict[str, Any], attempt: int) -> Answer:
        number = int(record["steps"][0]["text"].split()[1])
        time.sleep(latencies[number])
        tries[number] += 1
        if name := faults[number]:
            _, times, fault = FAULTS[name]
            if tries[number] <= times:
                return fault(server)
        good[number] += 1
        return verdict(record)

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await asyncio.sleep(seconds / 100)

    good: Counter[int] = Counter()
    waited: list[float] = []
    server.otherwise = script
    requests = make_requests(faults)
    config = judge_config(server, concurrency=CONCURRENCY, timeout=5.0, breaker_failures=40)
    with closing(CachedJudge(OpenAIJudge(Endpoint(config, sleep=sleep)), VerdictCache(tmp_path))) as judge:
        futures = [judge.submit(request) for request in requests]
        again = [judge.submit(requests[i]) for i in range(0, TOTAL, 16)]  # while the first are under way
        results = [future.result(120) for future in futures]
        assert [future.result(120) for future in again] == results[::16]
        stats = judge.stats()

    for request, result, fault in zip(requests, results, faults, strict=True):
        if fault and fault.startswith("always"):
            assert isinstance(result, Unjudged)
        else:
            assert result == expected(request), fault
    lost = [i for i, fault in enumerate(faults) if not (fault and fault.startswith("always")) and good[i] != 1]
    assert lost == []
    assert good.total() == TOTAL - 40
    assert server.most_active <= CONCURRENCY + 24  # the server's side of what was given up may live on
    assert sum(wait >= 1.0 for wait in waited) >= 200  # Retry-After was honoured

    counts = {name: stats[f"judge/{name}"] for name in ("requests", "unjudged", "rate_limited", "repairs")}
    # Two of every three "always broken" tries are retries, and "always garbage" is mended once in vain.
    retries = 200 + 2 * 100 + 100 + 100 + 12 + 12 + 2 * 20
    assert counts == {"requests": TOTAL, "unjudged": 40, "rate_limited": 200, "repairs": 100 + 60 + 60 + 60 + 20}
    assert stats["judge/retries"] == retries
    assert stats["judge/breaker_openings"] == 0

    # A second process asks for nothing but what stayed unjudged.
    asked = server.asked.total()
    with closing(CachedJudge(OpenAIJudge(Endpoint(config, sleep=sleep)), VerdictCache(tmp_path))) as judge:
        assert [type(result) for result in judge.judge(requests)] == [type(result) for result in results]
        assert judge.stats()["judge/cached"] == TOTAL - 40
    assert server.asked.total() - asked == 20 * 2 + 20 * 3


def test_verdicts_survive_a_kill(server: JudgeServer, tmp_path: Path) -> None:
    """What one process was told, another finds, although the first never closed anything."""
    requests = make_requests([None] * 64)
    judge = CachedJudge(OpenAIJudge(Endpoint(judge_config(server))), VerdictCache(tmp_path))
    told = [judge.submit(request).result(60) for request in requests[:40]]
    asked = server.asked.total()
    with closing(CachedJudge(OpenAIJudge(Endpoint(judge_config(server))), VerdictCache(tmp_path))) as other:
        assert other.judge(requests[:40]) == told
    assert server.asked.total() == asked == 40
    judge.close()
