from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from mrpo.config import RewardConfig
from mrpo.errors import UserError
from mrpo.rewards import AnswerReward
from mrpo.rewards.bertscore import BertScore

WORDS = ["left", "right", "lung", "mass", "nod", "##ule", "in", "the", "upper", "lobe"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
LAYER = 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(VOCAB)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def brute_force(folder: Path, prediction: list[str], gold: list[str]) -> float:
    """F1 in float64 from one text at a time; the texts are given as word pieces."""
    model = AutoModel.from_pretrained(folder).eval()

    def states(pieces: list[str]) -> np.ndarray:
        ids = [VOCAB.index(piece) for piece in ["[CLS]", *pieces, "[SEP]"]]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][0]
        rows = hidden.double().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    p, g = states(prediction), states(gold)
    precision = sum(max(float(row @ other) for other in g) for row in p[1:-1]) / len(prediction)
    recall = sum(max(float(row @ other) for other in p) for row in g[1:-1]) / len(gold)
    return 2 * precision * recall / (precision + recall)


def test_equals_brute_force(encoder: Path) -> None:
    pairs = [
        (["left", "lung"], ["right", "upper", "lobe", "nod", "##ule"]),
        (["nod", "##ule", "in", "the", "left", "lobe"], ["mass"]),
        (["lobe"], ["lobe", "lobe"]),
    ]
    texts = [tuple(" ".join(side).replace(" ##", "") for side in pair) for pair in pairs]
    scores = BertScore(str(encoder), LAYER, batch_size=2).f1([p for p, _ in texts], [g for _, g in texts])
    assert scores == pytest.approx([brute_force(encoder, *pair) for pair in pairs], abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 3


def test_same_text_scores_one_and_an_empty_one_zero(encoder: Path) -> None:
    scores = BertScore(str(encoder), LAYER).f1(["left lung", ""], ["Left LUNG", "left lung"])
    assert scores == pytest.approx([1.0, 0.0])


def test_long_text_is_truncated(encoder: Path) -> None:
    f1 = BertScore(str(encoder), LAYER).f1
    assert f1(["left " * 50], ["lung"]) == pytest.approx(f1(["left " * 10], ["lung"]))


def test_joins_the_answer_reward_with_its_weight(encoder: Path) -> None:
    reward = AnswerReward(RewardConfig(bertscore_model=str(encoder), bertscore_layer=LAYER))
    (value, parts), (missing, nothing) = reward(["left lung", None], ["left upper lobe", "lung"])
    expected = brute_force(encoder, ["left", "lung"], ["left", "upper", "lobe"])
    assert parts["bertscore"] == pytest.approx(expected, abs=1e-5)
    assert value == pytest.approx(0.25 * parts["rouge1"] + 0.25 * parts["bleu1"] + 0.5 * parts["bertscore"])
    assert missing == nothing["bertscore"] == 0.0


def test_bad_encoder_is_refused_by_name(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward\.bertscore_layer=4 is above the 3 layers"):
        BertScore(str(encoder), 4)
    with pytest.raises(UserError, match=r"reward\.bertscore_model=.*missing"):
        BertScore(str(tmp_path / "missing"), 1)
