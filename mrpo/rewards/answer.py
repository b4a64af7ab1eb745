"""The answer reward: 1 when the answer is the gold one, else how much of it they share.

Two answers are the same when they are equal but for case, white space and a final full stop, or one quantity by
math-verify. Otherwise the reward is a weighted mean of ROUGE-1 F1, BLEU-1 with brevity penalty and, where an encoder
is configured, BERTScore F1; the weights are rescaled to sum to 1 over the parts that are there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mrpo.config import RewardConfig
from mrpo.errors import UserError
from mrpo.rewards.bertscore import BertScore
from mrpo.rewards.symbolic import same_quantity

# Numbers stay whole, with sign and relation: "<3.5" shares no word with ">3.5" or "5.3". A hyphen behind a word, as in
# "CA-125" or "2-3 cm", is no sign (re takes combining accents, degrees and primes for no part of it). Han and Kana are
# single words.
_WORD = re.compile(
    r"(?:(?<![\w\u0300-\u036f%\u00b0\u2032\u2033)\]])[-+]|[<>≤≥~])?\d+(?:[.,]\d+)*%?"
    r"|[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)


# A reward in [0, 1] and its parts by name.
AnswerScore: TypeAlias = tuple[float, dict[str, float]]


class _Words:
    """The word splitter that both scores share."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


_WORDS = _Words()
_ROUGE = RougeScorer(["rouge1"], tokenizer=_WORDS)
# Smoothing acts on orders without a match; at order 1 sacrebleu scores such an answer 0.
_BLEU = BLEU(max_ngram_order=1, smooth_method="exp", tokenize="none", effective_order=True)


class AnswerReward:
    """Scores answers against gold answers."""

    def __init__(self, config: RewardConfig) -> None:
        """Loads the BERTScore encoder if `config.bertscore_model` names one.

        Raises:
            UserError: the encoder cannot be loaded, has no layer `config.bertscore_layer`, or all weights are 0.
        """
        weights = {"rouge1": config.rouge_weight, "bleu1": config.bleu_weight}
        self._bertscore: BertScore | None = None
        if config.bertscore_model is not None:
            weights["bertscore"] = config.bertscore_weight
            self._bertscore = BertScore(config.bertscore_model, config.bertscore_layer)
        total = sum(weights.values())
        if total <= 0:
            raise UserError("one of reward.rouge_weight, bleu_weight and bertscore_weight must be above 0")
        self._weights = {name: weight / total for name, weight in weights.items()}

    def __call__(self, predictions: Sequence[str | None], golds: Sequence[str]) -> list[AnswerScore]:
        """For each pair the reward in [0, 1] and its parts: symbolic, rouge1, bleu1, bertscore if on, lexical.

        A missing or empty prediction scores 0 in every part.
        """
        texts = [(prediction or "").strip() for prediction in predictions]
        parts = [dict(_word_parts(text, gold)) for text, gold in zip(texts, golds, strict=True)]
        if self._bertscore is not None:
            for text, part, f1 in zip(texts, parts, self._bertscore.f1(texts, golds), strict=True):
                part["bertscore"] = min(max(f1, 0.0), 1.0) if text else 0.0
        return [self._combine(part) for part in parts]

    def _combine(self, parts: dict[str, float]) -> AnswerScore:
        lexical = min(sum(weight * parts[name] for name, weight in self._weights.items()), 1.0)
        reward = 1.0 if parts["symbolic"] else lexical
        return reward, parts | {"lexical": lexical}


@lru_cache(maxsize=1 << 16)
def _word_parts(prediction: str, gold: str) -> tuple[tuple[str, float], ...]:
    if not prediction:
        return (("symbolic", 0.0), ("rouge1", 0.0), ("bleu1", 0.0))
    same = _normalized(prediction) == _normalized(gold) or same_quantity(prediction, gold)
    rouge = _ROUGE.score(gold, prediction)["rouge1"].fmeasure
    hypothesis, reference = (" ".join(_WORDS.tokenize(text)) for text in (prediction, gold))
    bleu = _BLEU.sentence_score(hypothesis, [reference]).score / 100
    return (("symbolic", float(same)), ("rouge1", rouge), ("bleu1", min(bleu, 1.0)))


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
