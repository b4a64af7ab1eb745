"""Judges that are a model behind an OpenAI-compatible endpoint: of reasoning steps, and of answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mrpo.config import JudgeConfig
from mrpo.judge import answer_prompt, prompt
from mrpo.judge.answers import AnswerRequest
from mrpo.judge.endpoint import ChatRequest, Endpoint
from mrpo.records import JudgeRequest, Unjudged, Verdict


class OpenAIJudge:
    """Asks about the steps of one completion per request.

    Raises:
        UserError: the environment variable `config.api_key_env` is not set; an endpoint of one's own needs none.
    """

    name = "openai"

    def __init__(self, config: JudgeConfig) -> None:
        self._endpoint = Endpoint(config)
        self.identity = f"{self._endpoint.identity}, steps, {prompt.VERSION}"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order; a completion without steps needs no asking."""
        questions = [
            ChatRequest(
                partial(prompt.build_messages, request),
                prompt.RESPONSE_FORMAT,
                partial(prompt.parse_verdict, request=request),
            )
            for request in requests
            if request.steps
        ]
        results = iter(self._endpoint.ask(questions))
        return [next(results) if request.steps else Verdict(()) for request in requests]


class OpenAIAnswerJudge:
    """Asks whether one answer says the same as the gold answer, per request.

    Raises:
        UserError: as `OpenAIJudge`.
    """

    name = "openai"

    def __init__(self, config: JudgeConfig) -> None:
        self._endpoint = Endpoint(config)
        self.identity = f"{self._endpoint.identity}, answers, {answer_prompt.VERSION}"

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One result per request, in order; a missing answer is wrong without asking."""
        questions = [
            ChatRequest(
                partial(answer_prompt.build_messages, request),
                answer_prompt.RESPONSE_FORMAT,
                answer_prompt.parse_verdict,
            )
            for request in requests
            if not request.is_empty
        ]
        results = iter(self._endpoint.ask(questions))
        return [False if request.is_empty else next(results) for request in requests]
