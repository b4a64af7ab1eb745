from __future__ import annotations

import re
import string
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mrpo.offsets import token_spans
from mrpo.records import Step
from mrpo.steps import extract_answer, find_steps, step_ids

CORPUS = ["The image is an axial CT of the chest. There is a mass in it.</thinking>\n<answer>mass</answer>"] * 4
CORPUS += [f"<think>{char}" for char in "漢漣漤漥漦漧漨"] * 4
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(*, regex: bool = True, decoder: decoders.Decoder | None = None) -> PreTrainedTokenizerFast:
    """Without the regex there are tokens of a tag's end and the first byte of "漢", and of several words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.decoder = decoder or decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def qwen_like() -> PreTrainedTokenizerFast:
    """Think tags are plain added tokens, the end of a turn a special one; ".</" and ".\\n\\n" are tokens."""
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["a.</a.\n\n"] * 9, trainers.BpeTrainer(initial_alphabet=ALPHABET))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def word_level() -> PreTrainedTokenizerFast:
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    words = ["[UNK]", *tags, "the", "image", "shows", "a", "mass", "left", ".", ",", "2"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def word_piece() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", *string.printable.split()[0], *(f"##{c}" for c in string.ascii_letters), "the", "##ss"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    return tokenizer


def sentence_piece() -> PreTrainedTokenizerFast:
    """Metaspace, and bytes for characters outside the vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *string.ascii_letters, *".,<>/2\u2581", "\u2581t"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("\u2581", "t")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


BYTE_LEVEL = byte_level()
MERGED = byte_level(regex=False)
STRIPPED = byte_level(regex=False, decoder=decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]))
QWEN = qwen_like()
OTHERS = {"word_level": word_level(), "word_piece": word_piece(), "sentence_piece": sentence_piece()}
TOKENIZERS = {"byte_level": BYTE_LEVEL, "merged": MERGED, "stripped": STRIPPED, "qwen": QWEN, **OTHERS}

WORDS = [
    "the",
    "image",
    "shows",
    "a",
    "mass",
    "left",
    "Dr.",
    "i.e.",
    "3.5",
    "2.",
    "(b)",
    "A",
    "≥2",
    "é",
    "है।",
    "漢字",
    "😀",
]
MARKS = [".", ",", "?", "!", "。", "...", "-", "**", "\n", "\u2028"]
prose = st.lists(st.sampled_from(WORDS + MARKS)).map(" ".join)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def covers_by_prefix(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Decode every prefix: what token i adds, up to a character that it has only begun."""
    text = decode(tokenizer, ids)
    prefixes = [decode(tokenizer, ids[:i]) for i in range(len(ids) + 1)]
    done = [max(n for n in range(len(prefix) + 1) if text[:n] == prefix[:n]) for prefix in prefixes]
    begun = [len(prefix) > n for prefix, n in zip(prefixes, done, strict=True)]
    return [(done[i], max(done[i] + 1, done[i + 1] + begun[i + 1])) for i in range(len(ids))]


def covers_by_byte(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Decode every prefix of the bytes: a byte writes the last character of the prefix that it ends."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    pieces = [bytes(byte_of[char] for char in token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    data = b"".join(pieces)
    char_of = [len(data[: i + 1].decode(errors="replace")) - 1 for i in range(len(data))]
    stops = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return [(char_of[stop - len(p)], char_of[stop - 1] + 1) for stop, p in zip(stops, pieces, strict=True)]


def check_spans(steps: Sequence[Step], text: str, covers: Sequence[tuple[int, int]]) -> None:
    """A step's tokens are those that write its characters, less what the step before took, and white space before."""
    untagged = re.sub("</?think>", lambda tag: "\0" * len(tag[0]), text)
    position = used = 0
    for step in steps:
        first = untagged.index(step.text, position)
        last = first + len(step.text)
        blank = len(text[:first].rstrip())
        writers = {i for i, (begin, end) in enumerate(covers) if begin < last and end > first}
        spaces = {i for i in range(min(writers)) if covers[i][0] >= blank}
        assert set(range(step.start, step.end)) == {i for i in writers | spaces if i >= used}
        assert step.text == step.text.strip()
        assert any(map(str.isalnum, step.text))
        position, used = last, step.end


@settings(max_examples=150, deadline=None)
@given(body=st.one_of(prose, unicode_text), name=st.sampled_from(["byte_level", "merged", "stripped", "qwen"]))
def test_spans_equal_brute_force_on_random_unicode(body: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(f" <think>{body}</think>\n<answer>x</answer>")["input_ids"]
    steps = find_steps(ids, tokenizer, think_tag="think")
    check_spans(steps, decode(tokenizer, ids), covers_by_prefix(tokenizer, ids))
    if "<" not in body:  # nothing is lost
        written = "".join(step.text for step in steps)
        assert [c for c in written if c.isalnum()] == [c for c in body if c.isalnum()]


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=80))
def test_spans_equal_brute_force_on_random_token_ids(ids: list[int]) -> None:
    steps = find_steps(ids, BYTE_LEVEL, think_tag="think")
    check_spans(steps, decode(BYTE_LEVEL, ids), covers_by_byte(BYTE_LEVEL, ids))


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=60, deadline=None)
@given(body=prose)
def test_spans_equal_brute_force_for_other_tokenizers(name: str, body: str) -> None:
    tokenizer = OTHERS[name]
    ids = tokenizer(f"<think> {body} </think> <answer> mass </answer>", add_special_tokens=False)["input_ids"]
    steps = find_steps(ids, tokenizer, think_tag="think")
    check_spans(steps, decode(tokenizer, ids), covers_by_prefix(tokenizer, ids))


def covers_by_fallback_byte(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Concatenate what SentencePiece's tokens spell, less the space that its decoder strips."""
    pieces = [bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("\u2581", " ").encode() for t in tokens]
    data = b"".join(pieces)
    stops = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    begins = [
        len(data[: stop - len(p) + 1].decode(errors="replace")) - 2 for stop, p in zip(stops, pieces, strict=True)
    ]
    return [
        (max(begin, 0), len(data[:stop].decode(errors="replace")) - 1)
        for begin, stop in zip(begins, stops, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(body=st.text("漢é😀。ab. ", max_size=20))
def test_spans_equal_brute_force_where_sentences_end_amid_a_run_of_byte_tokens(body: str) -> None:
    tokenizer = OTHERS["sentence_piece"]
    ids = tokenizer(f"<think>{body}</think>")["input_ids"]
    covers = covers_by_fallback_byte(tokenizer.convert_ids_to_tokens(ids))
    check_spans(find_steps(ids, tokenizer, think_tag="think"), decode(tokenizer, ids), covers)


def test_hand_counted_spans_of_byte_tokens() -> None:
    tokenizer = OTHERS["sentence_piece"]
    ids = tokenizer("左肺。恶性。")["input_ids"]
    assert len(ids) == 1 + 6 * 3
    assert find_steps(ids, tokenizer, think_tag="think") == [Step("左肺。", 0, 10), Step("恶性。", 10, 19)]


fallback_ids = st.one_of(
    st.sampled_from("漢é。\ufffd").map(lambda char: [1 + byte for byte in char.encode()]),
    st.lists(st.integers(0, len(OTHERS["sentence_piece"]) - 1), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(runs=st.lists(fallback_ids, max_size=8))
def test_spans_are_monotone_for_any_byte_tokens(runs: list[list[int]]) -> None:
    ids = [token for run in runs for token in run]
    tokenizer = OTHERS["sentence_piece"]
    spans = token_spans(ids, tokenizer, decode(tokenizer, ids))
    for bound in (spans.begin, spans.end):
        positions = [bound(i) for i in range(len(ids))]
        assert positions == sorted(positions)


def texts(text: str, think_tag: str = "think") -> list[str]:
    return [step.text for step in find_steps(BYTE_LEVEL(text)["input_ids"], BYTE_LEVEL, think_tag=think_tag)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "The mass measures 3.5 cm. Dr. Smith vs. the T2-weighted image, e.g. Fig. 2. No effusion.",
            ["The mass measures 3.5 cm.", "Dr. Smith vs. the T2-weighted image, e.g. Fig. 2.", "No effusion."],
        ),
        ("It is approx. 3 cm. The pt. has hx. of COPD.", ["It is approx. 3 cm.", "The pt. has hx. of COPD."]),
        ("It is enlarged. It measures 3 cm approx.", ["It is enlarged.", "It measures 3 cm approx."]),
        ("1. Opacity, upper seg.\n2. No effusion.", ["1. Opacity, upper seg.", "2. No effusion."]),
        ("Normal for its vol.\nNo lesion.", ["Normal for its vol.", "No lesion."]),
        ("2. The second. 10. The tenth.", ["2. The second.", "10. The tenth."]),
        ("1) A mass. (2) No edema.\n- Bright.", ["1) A mass.", "(2) No edema.", "- Bright."]),
        ("2.\nA mass.", ["2.\nA mass."]),
        ("A mass. 2.", ["A mass. 2."]),
        ("3.", ["3."]),
        ("**Step 1.** A mass. **Step 2.** No edema.", ["**Step 1.** A mass.", "**Step 2.** No edema."]),
        ('He said "It is benign." Then left.', ['He said "It is benign."', "Then left."]),
        ("A mass\n\n\nNo effusion", ["A mass", "No effusion"]),
        ("a mass. it is left", ["a mass.", "it is left"]),
        ("A mass.\n...\n---\nIt is left.", ["A mass.", "It is left."]),
        ("这是CT图像。左肺有肿块\uff01恶性。", ["这是CT图像。", "左肺有肿块\uff01", "恶性。"]),
        ("यह एक सीटी स्कैन है। बाएं फेफड़े में गांठ है।", ["यह एक सीटी स्कैन है।", "बाएं फेफड़े में गांठ है।"]),
        ("هل هذا ورم؟ نعم. هذا ورم خبيث.", ["هل هذا ورم؟", "نعم.", "هذا ورم خبيث."]),
        ("A.\u2028B C\u2028. 😀 D.", ["A.\u2028B C", "😀 D."]),
        ("", []),
        (" \n ... \n", []),
    ],
)
def test_sentences(body: str, expected: list[str]) -> None:
    assert texts(f"<think>{body}</think><answer>x. y. z.</answer>") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>It is left. No edema.", ["It is left.", "No edema."]),
        ("<think>It is left. No edema.</thi", ["It is left.", "No edema."]),
        ("<think>It is left. <answer>x</answer> No edema.</think>", ["It is left."]),
        ("It is left. No edema.</think><answer>x</answer>", ["It is left.", "No edema."]),
        ("It is left.</think> No edema. <think>So benign.</think>", ["It is left."]),
        ("</think> No edema. <think>So benign.</think>", []),
        ("It is left. No edema. <answer>x</answer>", ["It is left.", "No edema."]),
        ("Hello. <think>It is left.</think> No edema. <think>So benign.</think>", ["It is left."]),
        ("<think><think>It is left.</think> No edema. <answer>x</answer>", ["It is left."]),
        ("<think>A mass. <think>No edema</think> so be it.</think> So.<answer>x", ["A mass.", "No edema", "so be it."]),
        ("<answer>x</answer>", []),
        ("", []),
    ],
)
def test_think_block(text: str, expected: list[str]) -> None:
    assert texts(text) == expected


def test_other_think_tag() -> None:
    assert texts("<thinking>A b.</thinking><answer>x", think_tag="thinking") == ["A b."]


def test_hand_counted_spans() -> None:
    ids = QWEN("<think>\nA b.\n\nC é.</think>\n<answer>x</answer><|im_end|>")["input_ids"]
    tokens = QWEN.convert_ids_to_tokens(ids)
    assert tokens[:11] == ["<think>", "Ċ", "A", "Ġ", "b", ".ĊĊ", "C", "Ġ", "Ã", "©", "."]
    steps = find_steps(ids, QWEN, think_tag="think")
    assert steps == [Step("A b.", 1, 6), Step("C é.", 6, 11)]


def test_tag_that_shares_a_token_with_a_sentence() -> None:
    ids = QWEN("<thinking>A.</thinking>")["input_ids"]
    steps = find_steps(ids, QWEN, think_tag="thinking")
    assert [(step.text, decode(QWEN, ids[step.start : step.end])) for step in steps] == [("A.", "A.</")]


@pytest.mark.parametrize("tokenizer", [MERGED, STRIPPED])
def test_tag_that_shares_a_token_with_part_of_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" <think>漢。")["input_ids"]
    (shared,) = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if ">" in token and token[-1] != ">"]
    assert find_steps(ids, tokenizer, think_tag="think") == [Step("漢。", shared, len(ids))]


def test_special_tokens_are_outside_and_unknown_words_inside() -> None:
    ids = QWEN("<think>A b.<|im_end|><|endoftext|>")["input_ids"]
    assert [decode(QWEN, ids[step.start : step.end]) for step in find_steps(ids, QWEN, think_tag="think")] == ["A b."]
    tokenizer = OTHERS["word_level"]
    ids = tokenizer("<think> the xyz mass . </think>")["input_ids"]
    assert find_steps(ids, tokenizer, think_tag="think") == [Step("the [UNK] mass .", 1, 5)]


def test_sentences_in_one_token_are_one_step() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "It is left. No edema. So": 1, "benign.": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    steps = find_steps([1, 2], tokenizer, think_tag="think")
    assert steps == [Step("It is left. No edema.", 0, 1), Step("So benign.", 1, 2)]


def test_step_ids() -> None:
    assert step_ids([Step("a", 1, 3), Step("b", 3, 4)], 6) == [-1, 0, 0, 1, -1, -1]
    assert step_ids([], 2) == [-1, -1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer> left lung\n</answer>", "left lung"),
        ("<think>a</think><answer>left", "left"),
        ("<think>a</think><answer>left</ans", "left"),
        ("<think>a", None),
        ("<think>a</think> left", None),
        ("<answer></answer>", ""),
        ("<think>a <answer>x</answer> b</think><answer>y</answer>", "y"),
        ("<think>a <answer>x</answer> b</think>", None),
        ("<think>a <answer>x</answer>", "x"),
        ("<answer>x</answer><answer>y</answer>", "x"),
        ("<answer>x <answer>y</answer>", "y"),
        ("<answer>a < b</answer>", "a < b"),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text, think_tag="think") == expected
