"""The byte tokenizer against Python's own UTF-8 codec, by itself and as transformers reads it."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from br_jax.models.tokenizer import CHAT_TEMPLATE, EOS, PAD, SEP, byte_tokenizer

TOKENIZER = byte_tokenizer()
plain_text = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not any(special in text for special in (PAD, EOS, SEP))
)


@given(plain_text)
@settings(max_examples=200, deadline=None)
def test_ids_are_the_bytes_and_decode_back(text):
    assert TOKENIZER.encode(text) == list(text.encode()) and TOKENIZER.decode(text.encode()) == text


def test_specials_are_single_distinct_tokens():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (256, 257)
    assert TOKENIZER.encode(f"a{SEP}b{EOS}") == [ord("a"), 258, ord("b"), 257]
    assert TOKENIZER.decode([97, 258, 98, 257, 256], skip_special_tokens=True) == "ab"
    assert TOKENIZER("é a", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (0, 1), (1, 2), (2, 3)]


def test_saved_tokenizer_is_the_same_to_transformers(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f" two  spaces\n\tüñí 漢字 🙂{SEP}ok{EOS}"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token, loaded.eos_token, len(loaded)) == (PAD, EOS, 259)
    messages = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"), ("user", "?"))]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == f"hi{SEP}yes{EOS}?{SEP}"


def test_a_models_spelling_changes_with_template_tokens_and_ends(tiny):
    other = byte_tokenizer()
    other.chat_template = CHAT_TEMPLATE.replace("in messages", "in messages[1:]")
    more = byte_tokenizer()
    more.add_tokens(["abc"])
    changes = ({"tokenizer": other}, {"tokenizer": more}, {"template": "alpaca"}, {"stop_tokens": (1, 2)})
    found = {dataclasses.replace(tiny, **change).spelling for change in changes}
    assert len(found | {tiny.spelling}) == 5
    assert dataclasses.replace(tiny, tokenizer=byte_tokenizer()).spelling == tiny.spelling
