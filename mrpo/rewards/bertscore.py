"""BERTScore (Zhang et al., arXiv 1904.09675) over any encoder, without idf weights and without rescaling.

The same arithmetic as the bert-score package, which does not run beside transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from mrpo.errors import UserError


class BertScore:
    """F1 of greedily matched token states."""

    def __init__(self, path: str, layer: int, *, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        """Loads the encoder in float32.

        Raises:
            UserError: the encoder cannot be loaded, or has no such layer.
        """
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward.bertscore_model={path!r} cannot be loaded; it must be the folder or hub id of an encoder "
                f"with its tokenizer and safetensors weights: {error}"
            ) from error
        if layer > model.config.num_hidden_layers:
            raise UserError(
                f"reward.bertscore_layer={layer} is above the {model.config.num_hidden_layers} layers of {path!r}"
            )
        self._model = model.eval().to(device)
        self._layer = layer
        self._device = device
        self._batch_size = batch_size
        self._max_length = min(self._tokenizer.model_max_length, model.config.max_position_embeddings)

    def f1(self, predictions: Sequence[str], golds: Sequence[str]) -> list[float]:
        """One score per pair, at most 1; 0 when either text has no token."""
        states = self._embed(sorted({*predictions, *golds}, key=len))
        return [_f1(*states[prediction], *states[gold]) for prediction, gold in zip(predictions, golds, strict=True)]

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For each text its unit token states (T, hidden) and which tokens are words (T,) bool, both on the CPU."""
        embedded = {}
        for start in range(0, len(texts), self._batch_size):
            batch = list(texts[start : start + self._batch_size])
            encoded = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            special = encoded.pop("special_tokens_mask").bool()
            output = self._model(**encoded.to(self._device), output_hidden_states=True)
            states = normalize(output.hidden_states[self._layer].float(), dim=-1).cpu()
            present = encoded["attention_mask"].bool().cpu()
            for i, text in enumerate(batch):
                embedded[text] = (states[i, present[i]], ~special[i, present[i]])
        return embedded


def _f1(
    prediction: torch.Tensor, prediction_words: torch.Tensor, gold: torch.Tensor, gold_words: torch.Tensor
) -> float:
    """Special tokens may be matched but are not averaged over, as in the bert-score package."""
    if not prediction_words.any() or not gold_words.any():
        return 0.0
    similarity = prediction @ gold.T
    precision = similarity.amax(dim=1)[prediction_words].mean().item()
    recall = similarity.amax(dim=0)[gold_words].mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
