"""The client of vLLM servers: against stand-ins that fail, and against a real server of vLLM's CPU build."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_logprobs import largest_difference
from fake_vllm_server import Answer, FakeServer
from safetensors.torch import save_file

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine
from mrpo.rollout.server_push import buckets
from mrpo.rollout.vllm_request import LOGPROBS_MODE
from mrpo.rollout.vllm_server import VLLMServerEngine
from mrpo.weights import checkpoint_weights

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class Alone:
    """A runtime of one process."""

    rank = 0
    is_main = True
    device = torch.device("cpu")

    def barrier(self) -> None:
        pass


def _config(*urls: str, **rollout: Any) -> Config:
    # Of a server that does not exist, where only the address counts.
    fixed = {"engine": "vllm_server", "servers": urls or ("http://h",), "sync_group": False}
    return Config.model_validate({"rollout": fixed | rollout})


def _engine(config: Config, processor: Processor, waits: list[float] | None = None) -> VLLMServerEngine:
    runtime: Any = Alone()
    return VLLMServerEngine(config, processor, runtime, sleep=([] if waits is None else waits).append)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(_config())


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[EncodedPrompt]:
    return [processor.encode_prompt(example) for example in PhantomDataset("test", size=8)]


@pytest.fixture(scope="module")
def description(processor: Processor) -> dict[str, Any]:
    """Of a server that was started as it should be."""
    return {
        "model": processor.model_config.to_dict(),
        "dtype": "float32",
        "max_model_len": 2048,
        "logprobs_mode": LOGPROBS_MODE,
    }


def _events(prompt_ids: list[int], ends: dict[int, list[int]]) -> list[dict[str, Any]]:
    """What a server streams: the first token of each completion, then the rest of each."""

    def chunk(i: int, tokens: list[int], reason: str | None) -> dict[str, Any]:
        logprobs = {"content": [{"logprob": -float(token)} for token in tokens]}
        return {"choices": [{"index": i, "token_ids": tokens, "logprobs": logprobs, "finish_reason": reason}]}

    start = [{"prompt_token_ids": prompt_ids, "choices": [{"index": i, "delta": {"role": "x"}} for i in ends]}]
    return [
        *start,
        *(chunk(i, t[:1], None) for i, t in ends.items()),
        *(chunk(i, t[1:], "stop") for i, t in ends.items()),
    ]


def _answers(prompts: list[EncodedPrompt]) -> Callable[[dict[str, Any]], Answer]:
    """Completion j of the prompt with seed s is (s, j, 7)."""

    def answer(request: dict[str, Any]) -> Answer:
        seed = request["seed"]
        ends = {j: [seed, j, 7] for j in reversed(range(request["n"]))}
        return _events(prompts[seed].input_ids.tolist(), ends)

    return answer


def _params(count: int) -> SamplingParams:
    return SamplingParams(2, 20, 1.0, tuple(range(count)))


def test_completions_are_told_of_in_the_servers_order_and_returned_in_ours(
    description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    with FakeServer(description, _answers(prompts)).running() as server:
        told: list[tuple[int, int, Completion]] = []
        groups = _engine(_config(server.url), processor).generate(
            prompts[1:2], SamplingParams(3, 20, 1.0, (1,)), lambda *what: told.append(what)
        )
    assert [c.token_ids for c in groups[0]] == [(1, j, 7) for j in range(3)]
    assert [c.logprobs for c in groups[0]] == [(-1.0, -float(j), -7.0) for j in range(3)]
    assert told == [(0, j, groups[0][j]) for j in (2, 1, 0)]


def test_requests_go_to_the_least_busy_server(
    description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    release = threading.Event()
    answer = _answers(prompts)

    def slow(request: dict[str, Any]) -> Answer:
        assert release.wait(60)
        return answer(request)

    with FakeServer(description, slow).running() as a, FakeServer(description, slow).running() as b:
        engine = _engine(_config(a.url, b.url), processor)
        result: list[Any] = []
        thread = threading.Thread(target=lambda: result.append(engine.generate(prompts, _params(8))))
        thread.start()
        while a.count("/v1/chat/completions") + b.count("/v1/chat/completions") < 8:
            time.sleep(0.01)
        assert (a.count("/v1/chat/completions"), b.count("/v1/chat/completions")) == (4, 4)
        release.set()
        thread.join()
    assert [group[1].token_ids for group in result[0]] == [(i, 1, 7) for i in range(8)]


@pytest.mark.parametrize("failure", [500, 503, "torn"])
def test_failed_requests_are_tried_again_and_nothing_is_told_twice(
    failure: int | str, description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    tries: Counter[int] = Counter()
    answer = _answers(prompts)

    def flaky(request: dict[str, Any]) -> Answer:
        tries[request["seed"]] += 1
        if tries[request["seed"]] > 2:
            return answer(request)
        if isinstance(failure, int):
            return failure
        events = answer(request)
        assert isinstance(events, list)
        return events[:-1]  # one completion ended, the other did not

    waits: list[float] = []
    told: list[tuple[int, int]] = []
    with FakeServer(description, flaky).running() as server:
        engine = _engine(_config(server.url), processor, waits)
        groups = engine.generate(prompts[:4], _params(4), lambda i, j, _: told.append((i, j)))
    assert [[c.token_ids for c in group] for group in groups] == [[(i, 0, 7), (i, 1, 7)] for i in range(4)]
    assert sorted(told) == [(i, j) for i in range(4) for j in range(2)]
    assert sorted(waits) == [2.0] * 4 + [4.0] * 4
    assert set(tries.values()) == {3}


def test_a_dead_server_is_left_for_another(
    description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    with FakeServer(description, _answers(prompts)).running() as alive:
        with FakeServer(description, _answers(prompts)).running() as dead:
            engine = _engine(_config(dead.url, alive.url), processor)
        assert len(engine.generate(prompts, _params(8))) == 8
        assert alive.count("/v1/chat/completions") == 8
    with pytest.raises(UserError, match=rf"rollout\.servers: ({dead.url}|{alive.url}) does not answer"):
        engine.generate(prompts, _params(8))


def test_a_refused_request_is_not_repeated(
    description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    with FakeServer(description, lambda request: 400).running() as server:
        with pytest.raises(UserError, match=r"refuses a request: .*status 400: made to fail"):
            _engine(_config(server.url), processor).generate(prompts[:1], _params(1))
        assert server.count("/v1/chat/completions") == 1


def test_another_expansion_of_the_prompt_is_an_error(
    description: dict[str, Any], processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    with FakeServer(description, _answers(prompts[::-1])).running() as server:
        engine = _engine(_config(server.url), processor)
        with pytest.raises(RuntimeError, match="chat template"):
            engine.generate(prompts[:1], _params(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "runs with dtype=bfloat16, not float32"),
        ({"logprobs_mode": "raw_logprobs"}, "runs with logprobs_mode=raw_logprobs, not processed_logprobs"),
        ({"max_model_len": 512}, "holds 512 tokens, fewer than prompt and completion, 1152"),
        ({"model": {"model_type": "internvl"}}, "serves another model than model.path=phantom: its model_type is"),
    ],
)
def test_a_server_that_does_not_fit_is_named_with_the_command_that_would(
    change: dict[str, Any], message: str, description: dict[str, Any], processor: Processor
) -> None:
    with FakeServer(description | change, lambda request: 500).running() as server:
        with pytest.raises(UserError) as error:
            _engine(_config(server.url), processor)
        assert server.url in str(error.value)
    assert message in str(error.value)
    assert "VLLM_SERVER_DEV_MODE=1 python -m vllm" in str(error.value)


def test_a_server_that_is_down_is_named(processor: Processor) -> None:
    with FakeServer({}, lambda request: 500).running() as server:
        pass
    with pytest.raises(UserError, match=rf"{server.url} is no server for rollouts: .*refused"):
        _engine(_config(server.url), processor)
    with pytest.raises(UserError, match="is no URL"):
        _engine(_config("host:8000"), processor)


def test_weights_are_sent_to_all_servers_in_order(description: dict[str, Any], processor: Processor) -> None:
    weights = {f"w{i}": torch.randn(1000) for i in range(3)}
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer(description, lambda request: 500).running()) for _ in range(2)]
        engine = _engine(_config(*(server.url for server in servers)), processor)
        engine.sync(lambda: iter(weights.items()))
    for server in servers:
        assert server.weights.keys() == weights.keys()
        assert all(torch.equal(server.weights[name], weights[name]) for name in weights)
        after = [path for path, _ in server.asked[2:]]
        assert after == ["/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache"]


def test_weights_are_broadcast_to_the_workers_of_all_servers(description: dict[str, Any], processor: Processor) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(FakeServer(description, lambda request: 500).running()) for _ in range(2)]
        engine = _engine(_config(*(server.url for server in servers), sync_group=True), processor)
        for seed in (0, 1):
            weights = {f"w{i}": torch.full((1000,), float(seed + i)) for i in range(3)}
            engine.sync(lambda weights=weights: iter(weights.items()))
            for server in servers:
                assert server.weights.keys() == weights.keys()
                assert all(torch.equal(server.weights[name], weights[name]) for name in weights)
                after = [path for path, _ in server.asked[-4:]]
                assert after == ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache"]


@pytest.mark.parametrize("broken", ["mrpo_find_store", "mrpo_join"])
def test_where_no_group_can_be_formed_the_way_out_is_named(
    broken: str, description: dict[str, Any], processor: Processor
) -> None:
    with FakeServer(description, lambda request: 500).running() as server:
        server.broken = {broken}
        with pytest.raises(UserError, match=rf"{server.url} .*rollout\.sync_group=false sends .*made to fail"):
            _engine(_config(server.url, sync_group=True, server_timeout=1), processor)


def test_a_server_that_does_not_take_broadcast_weights_is_named(
    description: dict[str, Any], processor: Processor
) -> None:
    with FakeServer(description, lambda request: 500).running() as server:
        engine = _engine(_config(server.url, sync_group=True, server_timeout=1), processor)
        server.broken = {"mrpo_receive_weights"}
        with pytest.raises(UserError, match=rf"{server.url} did not take the new weights: .*made to fail"):
            engine.sync(lambda: iter([("w", torch.ones(1 << 22))]))


def test_a_server_that_was_started_anew_is_named_at_once(description: dict[str, Any], processor: Processor) -> None:
    with FakeServer(description, lambda request: 500).running() as server:
        engine = _engine(_config(server.url, sync_group=True, server_timeout=600), processor)
        server.groups = []
        with pytest.raises(UserError, match=rf"{server.url} did not take the new weights: .*anew.*--resume"):
            engine.sync(lambda: iter([("w", torch.ones(1))]))


def test_buckets_hold_what_fits() -> None:
    weights = [(f"w{i}", torch.randn(size)) for i, size in enumerate((10, 20, 100, 5, 5))]
    parts = list(buckets(iter(weights), limit=4 * 30))
    assert [list(part) for part in parts] == [["w0", "w1"], ["w2"], ["w3", "w4"]]
    assert all(torch.equal(dict(weights)[name], tensor) for part in parts for name, tensor in part.items())


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("by", ["group", "http", "folder"])
def test_a_real_server_samples_from_the_weights_it_was_sent(
    by: str, server_url: str, processor: Processor, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    folder = tmp_path / "sync" if by == "folder" else None
    config = _config(server_url, sync_group=by == "group", sync_folder=folder)
    processor = load_processor(config)
    model = load_model(config.model)
    engine = _engine(config, processor)
    left = tmp_path / "sync" / "weights-99999.safetensors"  # by a push that was killed
    if by == "folder":
        left.parent.mkdir()
        save_file({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, left)
    params = SamplingParams(4, 60, 1.2, tuple(range(0, 800, 100)))

    def mismatch() -> float:
        told: list[tuple[int, int, Completion]] = []
        groups = engine.generate(prompts, params, lambda *what: told.append(what))
        assert len(told) == 32
        assert all(groups[i][j] == completion for i, j, completion in told)
        return largest_difference(model, processor, prompts, groups, 1.2)

    generator = torch.Generator().manual_seed(len(by))
    engine.sync(lambda: checkpoint_weights(model, zero_stage=0))
    assert mismatch() < 2e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    assert mismatch() > 1e-2
    engine.sync(lambda: checkpoint_weights(model, zero_stage=0))
    assert mismatch() < 2e-5
    assert [*tmp_path.glob("sync/*")] == ([left] if by == "folder" else [])
    greedy = SamplingParams(1, 60, 0.0)
    reference = HFEngine(model, processor, batch_size=64, weights=nullcontext)
    assert engine.generate(prompts, greedy) == reference.generate(prompts, greedy)
