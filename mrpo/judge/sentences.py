"""The lexical stand-in with a sentence encoder beside it, which knows synonyms.

A step is aligned when it shares enough words with the gold rationale, or when the encoder finds it close in meaning to
one of the rationale's sentences. The encoder rescues wordings that the words alone miss ("cardiomegaly" for "enlarged
heart"); it can no more tell a finding from its negation, and it is as little a medical judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import sentencex
import torch
from transformers import AutoModel, AutoTokenizer

from mrpo.errors import UserError
from mrpo.judge.lexical import LexicalJudge
from mrpo.records import JudgeRequest, Unjudged, Verdict


class SentenceEncoder:
    """A Hugging Face encoder in `folder`, such as all-MiniLM-L6-v2, whose token states are averaged.

    Raises:
        UserError: `folder` holds no encoder with its tokenizer and safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(f"judge.encoder={folder} is no folder of a sentence encoder: {reason}") from None

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        """(N, H) float32 rows of length 1: the mean state of each sentence's tokens."""
        batch = self._tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = self._model(**batch).last_hidden_state  # (N, T, H)
        is_token = batch["attention_mask"][..., None].to(states.dtype)
        mean = (states * is_token).sum(dim=1) / is_token.sum(dim=1).clamp_min(1.0)
        return torch.nn.functional.normalize(mean, dim=-1)

    def similarity(self, steps: Sequence[str], rationale: str) -> list[float]:
        """For each step the largest cosine to a sentence of `rationale`; -1 where there is nothing to compare."""
        gold = [sentence.strip() for sentence in sentencex.segment("en", rationale) if sentence.strip()]
        if not steps or not gold:
            return [-1.0] * len(steps)
        vectors = self.encode([*steps, *gold])
        return (vectors[: len(steps)] @ vectors[len(steps) :].T).amax(dim=1).tolist()


class SentenceJudge:
    """`LexicalJudge` that also takes a step whose cosine is at least `min_similarity`; works in a thread of its own."""

    name = "lexical with encoder"

    def __init__(self, encoder: SentenceEncoder, min_overlap: float, min_similarity: float) -> None:
        self._encoder, self._min_similarity = encoder, min_similarity
        self._lexical = LexicalJudge(min_overlap=min_overlap)
        self._thread = ThreadPoolExecutor(1, "sentence-judge")

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        return self._thread.submit(self._judge_one, request)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One verdict per request, in order; none is ever unjudged."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._thread.shutdown()

    def _judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        similarity = self._encoder.similarity(request.steps, request.example.rationale or "")
        return self._lexical.compare(request, [value >= self._min_similarity for value in similarity])
