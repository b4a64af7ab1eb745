"""A judge on this machine: an HTTP server in a process of its own that speaks the OpenAI protocol and takes its time.

Latencies are log-normal. Each round of requests gets the same latencies in the same order: the quantiles of the
distribution, shuffled once; so no way of training draws a luckier judge than another. Only the standard library.

usage: step_judge.py MEDIAN TAIL, seconds; TAIL is the 99th percentile. The first line of the output is the URL.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

_QUANTILE = 0.99


def latencies(count: int, median: float, tail: float) -> list[float]:
    """`count` seconds whose distribution is log-normal with this median and 99th percentile, in a fixed order."""
    sigma = math.log(tail / median) / NormalDist().inv_cdf(_QUANTILE)
    normal = NormalDist(math.log(median), sigma)
    seconds = [math.exp(normal.inv_cdf((place + 0.5) / count)) for place in range(count)]
    random.Random(count).shuffle(seconds)
    return seconds


class Judge:
    """Answers; `GET /round/N` begins a round of N requests, `GET /stats` tells how many came since.

    Both tell how many came (`asked`), how many are under way (`active`), and the most there were at once (`most`).
    """

    def __init__(self, median: float, tail: float) -> None:
        self._median, self._tail = median, tail
        self._parent = os.getppid()
        self._active = 0
        self._begin(64)

    def _begin(self, count: int) -> None:
        self._seconds = latencies(count, self._median, self._tail)
        self._asked, self._most = 0, self._active

    async def serve(self) -> None:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1024)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            # Until the process that started this one is gone.
            while os.getppid() == self._parent:
                await asyncio.sleep(0.5)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests one after the other until the client has gone."""
        try:
            while line := await reader.readline():
                _, path, _ = line.decode().split()
                length = 0
                while (header := await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                body = await reader.readexactly(length)
                answer = json.dumps(await self._answer(path, body)).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
                writer.write(head.encode() + answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/round/"):
            self._begin(int(path.rpartition("/")[2]))
        if not path.endswith("/chat/completions"):
            return {"asked": self._asked, "active": self._active, "most": self._most}
        seconds = self._seconds[self._asked % len(self._seconds)]
        self._asked += 1
        self._active += 1
        self._most = max(self._most, self._active)
        verdict = verdict_text(json.loads(body))
        await asyncio.sleep(seconds)
        self._active -= 1
        message = {"role": "assistant", "content": verdict}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": choices}


def verdict_text(request: Mapping[str, Any]) -> str:
    """The verdict on the steps of the record in the last message; half of all steps are valid, always the same ones."""
    text = request["messages"][-1]["content"][-1]["text"]
    steps = json.loads(text.partition("<record>")[2].partition("</record>")[0])["steps"]
    entries = [
        {
            "index": step["index"],
            "reason": "as drawn",
            "gold_alignment": zlib.crc32(step["text"].encode()) % 2 == 0,
            "answer_contribution": False,
        }
        for step in steps
    ]
    return json.dumps({"steps": entries})


if __name__ == "__main__":
    asyncio.run(Judge(float(sys.argv[1]), float(sys.argv[2])).serve())
