from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.data.phantom.language import TEMPLATES, parse
from mrpo.data.phantom.scene import Organ, Scene

SENTENCES = [sentence for template in TEMPLATES.values() for sentence in template.instances()]
SCENE = Scene(
    modality="MRI",
    tone="dark",
    organs=(
        Organ("liver", "upper left", 0),
        Organ("spleen", "upper right", 2),
        Organ("left kidney", "lower right", 1),
    ),
    pixel_seed=0,
)


@given(st.sampled_from(SENTENCES))
def test_what_a_template_writes_is_read_back(sentence):
    statement = parse(sentence)
    assert statement is not None
    assert statement.text == sentence


def test_no_two_templates_write_the_same_sentence():
    assert len(set(SENTENCES)) == len(SENTENCES)


@given(st.sampled_from(SENTENCES), st.data())
def test_a_changed_sentence_is_not_read_as_the_same(sentence, data):
    at = data.draw(st.integers(0, len(sentence) - 1))
    letter = data.draw(st.sampled_from("aZ .,0"))
    changed = sentence[:at] + letter + sentence[at + 1 :]
    assert changed == sentence or parse(changed) is None or parse(changed) != parse(sentence)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "The image is an MRI scan",
        "the image is an MRI scan.",
        "The image is a MRI scan.",
        "The image is an MRI  scan.",
        "The image is an MRI scan. Each lesion is dark.",
        "The spleen holds two or three lesions.",
        "The spleen holds two lesion.",
        "The spleen holds one lesions.",
        "The spleen may hold two lesions.",
        "The image is an MRI scan.\n",
    ],
)
def test_what_is_no_sentence_is_not_read(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("The image is an MRI scan.", True),
        ("The image is a CT scan.", False),
        ("The spine is dark.", True),
        ("The spine is bright.", False),
        ("The fat is bright.", True),
        ("The texture is grainy.", False),
        ("These signs suggest MRI.", True),
        ("Each lesion is dark.", True),
        ("Each lesion is in the upper right.", False),
        ("The upper right belongs to the spleen.", True),
        ("The upper right belongs to the stomach.", False),
        ("The left kidney is in the lower right.", True),
        ("The right kidney is in the lower left.", False),  # it is not on this image
        ("The spleen holds two lesions.", True),
        ("The spleen holds three lesions.", False),
        ("The liver holds zero lesions.", True),
        ("The other organs hold zero lesions.", False),
        ("The other organs hold one lesion.", True),
        ("Adding two and one makes three.", True),
        ("Adding two and one makes four.", False),
        ("On MRI dark lesions suggest fibrosis.", True),
        ("On CT dark lesions suggest fibrosis.", False),
        ("So the answer is three.", True),
        ("So the answer is two.", False),
    ],
)
def test_truth_of_statements(text, truth):
    statement = parse(text)
    assert statement is not None
    assert statement.is_true(SCENE, "three") is truth
