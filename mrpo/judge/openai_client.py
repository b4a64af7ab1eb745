"""Judges that are a model behind an OpenAI-compatible endpoint: of reasoning steps, and of answers.

A request is about one completion, so that each is judged the moment its generation ends. The requests of a prompt begin
alike, images first: an endpoint that caches prefixes (OpenAI, vLLM) reads the images once, and with `judge.image_ids`
vLLM is sent their bytes once. One request for all completions of a prompt would have to wait for the longest of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from mrpo.judge import answer_prompt, finished, prompt
from mrpo.judge.answers import AnswerRequest
from mrpo.judge.endpoint import ChatRequest, Endpoint
from mrpo.records import Example, JudgeRequest, Unjudged, Verdict


class OpenAIJudge:
    """Asks `endpoint` about the steps of one completion per request; closing it closes the endpoint."""

    name = "openai"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.identity = f"{endpoint.identity}, steps, {prompt.VERSION}"
        self.stats, self.close = endpoint.stats, endpoint.close

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        """A completion without steps needs no asking."""
        if not request.steps:
            return finished(Verdict(()))
        counted = self._endpoint.config.count_in_schema
        return self._endpoint.submit(
            ChatRequest(
                partial(prompt.build_messages, request, self._endpoint.image_part),
                prompt.counted_format(len(request.steps)) if counted else prompt.RESPONSE_FORMAT,
                partial(prompt.parse_verdict, request=request),
                _group(request.example),
            )
        )

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order."""
        return [future.result() for future in [self.submit(request) for request in requests]]


class OpenAIAnswerJudge:
    """Asks `endpoint` whether one answer says the same as the gold answer, per request."""

    name = "openai"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.identity = f"{endpoint.identity}, answers, {answer_prompt.VERSION}"
        self.close = endpoint.close

    def submit_answers(self, requests: Sequence[AnswerRequest]) -> list[Future[bool | Unjudged]]:
        """A missing answer is wrong without asking."""
        return [finished(False) if request.is_empty else self._submit(request) for request in requests]

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One result per request, in order."""
        return [future.result() for future in self.submit_answers(requests)]

    def _submit(self, request: AnswerRequest) -> Future[bool | Unjudged]:
        return self._endpoint.submit(
            ChatRequest(
                partial(answer_prompt.build_messages, request),
                answer_prompt.RESPONSE_FORMAT,
                partial(answer_prompt.parse_verdict, request=request),
                _group(request.example),
            )
        )


def _group(example: Example) -> str:
    """A name for the requests about one question that tells nothing of it."""
    return hashlib.sha256(example.id.encode(errors="replace")).hexdigest()[:32]
