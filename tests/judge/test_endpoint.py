"""What keeps a slow, failing or lying endpoint from holding up a run, against a real HTTP server."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import openai
import pytest
from judge_server import Answer, DrippedError, DroppedError, JudgeServer, completion, verdict, verdict_text
from judging import Make, judge_config, judge_request
from PIL import Image
from pydantic import ValidationError

from mrpo.judge.endpoint import Endpoint
from mrpo.judge.openai_client import OpenAIJudge
from mrpo.records import Unjudged, Verdict


def reason(result: Verdict | Unjudged) -> str:
    assert isinstance(result, Unjudged)
    return result.reason


def test_submit_returns_before_the_verdict(server: JudgeServer, make: Make) -> None:
    let_go = threading.Event()

    def script(record: dict[str, Any], attempt: int) -> Answer:
        assert let_go.wait(30)
        return verdict(record)

    server.otherwise = script
    judge = make()
    futures = [judge.submit(judge_request(f"q{i}")) for i in range(8)]
    assert not any(future.done() for future in futures)
    let_go.set()
    assert all(isinstance(future.result(30), Verdict) for future in futures)


def test_an_unfit_answer_is_mended_by_saying_what_was_wrong(server: JudgeServer, make: Make) -> None:
    server.script = {"q": lambda record, n: verdict(record, steps=1) if n == 1 else verdict(record)}
    judge = make()
    (result,) = judge.judge([judge_request("q", ("CT.", "A mass.", "Left."))])
    assert isinstance(result, Verdict)
    first, second = server.bodies
    assert second["messages"][:2] == first["messages"]
    assistant, told = second["messages"][2:]
    assert (assistant["role"], told["role"]) == ("assistant", "user")
    assert len(json.loads(assistant["content"])["steps"]) == 1
    assert "1 entries for 3 steps" in told["content"]
    assert judge.stats()["judge/repairs"] == 1


UNUSABLE = {
    "refused": (lambda record: completion(None, message={"refusal": "I cannot judge this."}), "refused"),
    "cut off": (lambda record: verdict(record, finish_reason="length"), "cut off"),
    "filtered": (lambda record: completion("", finish_reason="content_filter"), "content filter"),
    "silent": (lambda record: completion(" "), "no text"),
    "endless": (lambda record: completion("valid " * 20_000), "longer than"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used_twice_is_unjudged(server: JudgeServer, make: Make, kind: str) -> None:
    answer, expected = UNUSABLE[kind]
    server.script = {
        "always": lambda record, n: answer(record),
        "once": lambda r, n: (answer if n == 1 else verdict)(r),
    }
    always, once = make().judge([judge_request("always"), judge_request("once")])
    assert expected in reason(always)
    assert isinstance(once, Verdict)
    assert server.asked == {"always": 2, "once": 2}
    assert all(len(json.dumps(body)) < 10_000 for body in server.bodies)  # an endless answer is not sent back whole


def test_connections_that_break_are_tried_again(server: JudgeServer, make: Make, waits: list[float]) -> None:
    def broken(sent: bytes) -> Any:
        def script(record: dict[str, Any], attempt: int) -> Answer:
            if attempt == 1:
                raise DroppedError(sent)
            return verdict(record)

        return script

    headers = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    starts = {
        "silent": b"",
        "in the headers": headers[:20],
        "in the body": headers + b'{"choices": [',
        "noise": b"\0\1\2\n",
    }
    server.script = {name: broken(sent) for name, sent in starts.items()}
    results = make().judge([judge_request(name) for name in starts])
    assert [isinstance(result, Verdict) for result in results] == [True] * 4
    assert server.asked == dict.fromkeys(starts, 2)
    assert len(waits) == 4


def test_a_server_that_drips_is_given_up(server: JudgeServer, make: Make) -> None:
    """Every byte comes within the time-out, which a limit per read would wait for without end."""

    def drip(record: dict[str, Any], attempt: int) -> Answer:
        raise DrippedError

    server.script = {"drip": drip}
    drips, good = make(timeout=0.3, retries=1).judge([judge_request("drip"), judge_request("good")])
    assert "timed out after 0.3 s (judge.timeout)" in reason(drips)
    assert isinstance(good, Verdict)
    assert server.asked["drip"] == 2


def test_the_deadline_bounds_all_tries_together(server: JudgeServer, make: Make) -> None:
    server.script = {"q": lambda record, attempt: (server.closing.wait(30), verdict(record))[1]}
    (result,) = make(timeout=0.2, deadline=0.5, retries=1000).judge([judge_request("q")])
    assert "timed out after 0.5 s (judge.deadline)" in reason(result)
    assert server.asked["q"] < 10
    with pytest.raises(ValidationError, match="deadline=5 must not be below timeout=10"):
        judge_config(server, timeout=10, deadline=5)


def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(
    server: JudgeServer, make: Make, waits: list[float]
) -> None:
    server.script = {"q": lambda record, attempt: (429, {"Retry-After": "3600"}, "{}")}
    assert "429" in reason(make().judge([judge_request("q")])[0])
    assert not waits


def test_an_endpoint_that_is_down_is_left_alone_and_taken_up_again(server: JudgeServer, make: Make) -> None:
    down = True
    server.otherwise = lambda record, attempt: (503, {}, "{}") if down else verdict(record)
    judge = make(concurrency=1, retries=0, breaker_failures=3, breaker_pause=0.2)
    results = judge.judge([judge_request(f"a{i}") for i in range(50)])
    assert all(isinstance(result, Unjudged) for result in results)
    assert sum("is down" in reason(result) for result in results) >= 40
    assert "503" in reason(results[-1])
    assert 3 <= server.asked.total() <= 10  # a probe may fall between
    stats = judge.stats()
    assert (stats["judge/breaker_openings"], stats["judge/unjudged"], stats["judge/requests"]) == (1, 50, 50)
    down = False
    time.sleep(0.25)
    assert all(isinstance(result, Verdict) for result in judge.judge([judge_request(f"b{i}") for i in range(20)]))


def test_an_outage_costs_no_verdict(server: JudgeServer, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    answers, lock = Counter[bool](), threading.Lock()

    def otherwise(record: dict[str, Any], attempt: int) -> Answer:
        with lock:
            down = 20 <= answers.total() < 60
            answers[down] += 1
        return (503, {}, "{}") if down else verdict(record)

    server.otherwise = otherwise
    judge = make(concurrency=8, retries=0, breaker_failures=1, breaker_pause=0.01)
    results = judge.judge([judge_request(f"a{i}") for i in range(60)])
    assert all(isinstance(result, Verdict) for result in results)
    assert answers == {False: 60, True: 40}
    stats = judge.stats()
    assert (stats["judge/unjudged"], stats["judge/requests"]) == (0, 60)
    assert "is down" in caplog.text
    assert "503" in caplog.text


def test_a_request_that_is_refused_does_not_speak_against_the_endpoint(server: JudgeServer, make: Make) -> None:
    server.otherwise = lambda record, attempt: (400, {}, '{"error": {"message": "image too large"}}')
    server.script = {"good": lambda record, attempt: verdict(record)}
    judge = make(concurrency=1, breaker_failures=2)
    *bad, good = judge.judge([judge_request(q) for q in ("a", "b", "c", "d", "good")])
    assert all("image too large" in reason(result) for result in bad)
    assert isinstance(good, Verdict)
    assert judge.stats()["judge/breaker_openings"] == 0


def test_counts_tokens_and_cost(server: JudgeServer, make: Make) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 600}}
    server.otherwise = lambda record, attempt: (429, {}, "{}") if attempt == 1 else verdict(record, usage=usage)
    judge = make(price_input=0.25, price_cached=0.025, price_output=2.0)
    judge.judge([judge_request(f"q{i}") for i in range(10)])
    stats = judge.stats()
    counts = {name: stats[f"judge/{name}"] for name in ("requests", "retries", "rate_limited", "repairs", "unjudged")}
    assert counts == {"requests": 10, "retries": 10, "rate_limited": 10, "repairs": 0, "unjudged": 0}
    tokens = {name: stats[f"judge/tokens_{name}"] for name in ("in", "cached", "out")}
    assert tokens == {"in": 10_000, "cached": 6_000, "out": 500}
    assert stats["judge/cost_usd"] == pytest.approx((4_000 * 0.25 + 6_000 * 0.025 + 500 * 2.0) / 1e6)
    assert 0 < stats["judge/latency_p50"] <= stats["judge/latency_p95"] <= stats["judge/latency_max"]
    assert stats["judge/busy_s"] <= stats["judge/serial_s"]
    assert judge.stats()["judge/requests"] == 0
    assert "judge/cost_usd" not in make().stats()


def test_further_fields_and_image_detail_are_sent_and_belong_to_the_identity(server: JudgeServer, make: Make) -> None:
    judges = [
        make(), make(extra={"reasoning_effort": "low", "max_tokens": 512}), make(image_detail="low"),
        make(max_image_pixels=10), make(count_in_schema=True),
    ]  # fmt: skip
    assert len({judge.identity for judge in judges}) == 5
    assert make(concurrency=3, timeout=5, image_ids=True, price_input=1.0).identity == judges[0].identity
    for judge in judges:
        judge.judge([judge_request("q")])
    plain, extra, detail, small, counted = server.bodies
    assert (extra["reasoning_effort"], extra["max_tokens"]) == ("low", 512)
    assert "reasoning_effort" not in plain
    image = [body["messages"][1]["content"][0]["image_url"] for body in (plain, detail, small)]
    assert "detail" not in image[0]
    assert image[1]["detail"] == "low"
    sizes = [Image.open(io.BytesIO(base64.b64decode(i["url"].partition(",")[2]))).size for i in (image[0], image[2])]
    assert sizes == [(8, 6), (3, 2)]  # at most 10 pixels, in the same shape
    schemas = [body["response_format"]["json_schema"]["schema"] for body in (plain, counted)]
    assert "maxItems" not in json.dumps(schemas[0])
    assert (schemas[1]["properties"]["steps"]["minItems"], schemas[1]["properties"]["steps"]["maxItems"]) == (2, 2)


def test_requests_of_a_prompt_are_routed_together_at_openai_alone(
    server: JudgeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().judge([judge_request("q")])
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    make(base_url=None).judge([judge_request("q")])
    assert [body for body in server.bodies if "prompt_cache_key" in body] == []
    monkeypatch.delenv("OPENAI_BASE_URL")
    client = openai.AsyncOpenAI
    monkeypatch.setattr(openai, "AsyncOpenAI", lambda **given: client(**given | {"base_url": server.url}))
    judge = make(base_url=None)
    judge.judge([judge_request("q", ("One.",)), judge_request("q", ("Two.",))])
    first, second = (body["prompt_cache_key"] for body in server.bodies[2:])
    assert first == second
    assert first != "1"  # the example's id stays here


def test_an_image_is_encoded_once_for_its_completions(
    server: JudgeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Image.Image] = []
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    images = (Image.new("RGB", (8, 6), "red"),)
    make().judge([judge_request(f"q{i}", images=images) for i in range(16)])
    assert len(saved) == 1
    urls = {body["messages"][1]["content"][0]["image_url"]["url"] for body in server.bodies}
    assert len(urls) == 1


class ImageStore:
    """A server that keeps images by their id, as vLLM does, and may forget them."""

    def __init__(self, server: JudgeServer) -> None:
        self.server, self.kept = server, set()
        self.sent_with_bytes = 0
        server.answer, self._answer = self.answer, server.answer  # type: ignore[method-assign]

    def answer(self, body: dict[str, Any], authorization: str | None) -> Answer:
        for part in body["messages"][1]["content"]:
            if part["type"] == "image_url":
                if part["image_url"] is None and part["uuid"] not in self.kept:
                    return (
                        400,
                        {},
                        '{"error": {"message": "Cache miss for image at index 0 but data is not provided."}}',
                    )
                if part["image_url"] is not None:
                    self.sent_with_bytes += 1
                    self.kept.add(part["uuid"])
        return self._answer(body, authorization)


def test_with_image_ids_the_bytes_are_sent_once(server: JudgeServer, make: Make) -> None:
    store = ImageStore(server)
    judge = make(image_ids=True, concurrency=1)
    requests = [
        judge_request(f"q{i}", images=(Image.new("RGB", (8, 6), c),)) for c in ("red", "blue") for i in range(8)
    ]
    assert all(isinstance(result, Verdict) for result in judge.judge(requests))
    assert store.sent_with_bytes == 2
    store.kept.clear()  # as after a restart
    assert all(isinstance(result, Verdict) for result in judge.judge(requests))
    assert store.sent_with_bytes == 4


def test_closing_ends_everything_at_once(server: JudgeServer) -> None:
    server.otherwise = lambda record, attempt: (server.closing.wait(60), verdict(record))[1]
    before = threading.active_count()
    judge = OpenAIJudge(Endpoint(judge_config(server, timeout=60, deadline=60, concurrency=4)))
    futures: list[Future[Any]] = [judge.submit(judge_request(f"q{i}")) for i in range(40)]
    began = time.monotonic()
    judge.close()
    judge.close()
    assert time.monotonic() - began < 20
    assert [reason(future.result(0)) for future in futures] == ["the judge was closed before its verdict"] * 40
    assert not [thread for thread in threading.enumerate() if thread.name == "judge"]
    assert threading.active_count() <= before + 4  # those of the server's own connections


def test_a_closed_judge_can_be_used_again(server: JudgeServer, make: Make) -> None:
    judge = make()
    for name in ("a", "b"):
        assert isinstance(judge.judge([judge_request(name)])[0], Verdict)
        judge.close()


CHILD = """
import sys
from contextlib import closing
from judging import judge_request
from mrpo.config import JudgeConfig
from mrpo.judge.endpoint import Endpoint
from mrpo.judge.openai_client import OpenAIJudge
config = JudgeConfig(kind="openai", base_url=sys.argv[1], timeout=60)
with closing(OpenAIJudge(Endpoint(config))) as judge:
    judge.judge([judge_request(f"q{i}") for i in range(8)])
"""


def test_ctrl_c_ends_a_process_that_waits_for_verdicts(server: JudgeServer) -> None:
    waiting = threading.Event()

    def hang(record: dict[str, Any], attempt: int) -> Answer:
        waiting.set()
        server.closing.wait(120)
        return verdict(record)

    server.otherwise = hang
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started the tests may have told this process to ignore it, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert waiting.wait(60)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert "KeyboardInterrupt" in said
    assert child.returncode != 0


def test_text_of_a_verdict_is_read_tolerantly_end_to_end(server: JudgeServer, make: Make) -> None:
    server.otherwise = lambda record, n: completion(f"Sure!\n```json\n{verdict_text(record)[:-2]},]}}\n```")
    assert isinstance(make().judge([judge_request()])[0], Verdict)
    assert server.asked.total() == 1
