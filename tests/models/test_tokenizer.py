"""The byte tokenizer against Python's UTF-8 codec; chat templates that do not end, or fail."""

import dataclasses
import signal
import threading

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from br_jax.data import templates
from br_jax.data.templates import render_chat
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


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 3600)  # no outcome depends on how busy the machine is
    return byte_tokenizer()


def test_as_transformers_renders_it(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}?{% endif %}"
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(MESSAGES, tokenizer, add_generation_prompt=prompt) == expected == "a" + "?" * prompt


@pytest.mark.parametrize("template", [NESTED, TWICE])
def test_one_that_does_not_end_is_stopped(tokenizer, template, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    tokenizer.chat_template = template
    with pytest.raises(jinja2.TemplateError, match=r"takes more than 0\.2 seconds"):
        render_chat(MESSAGES, tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{% for %}", "Expected an expression"),
        (" " * 200_000, "more than 131,072 characters"),
    ],
)
def test_one_that_fails(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(jinja2.TemplateError, match=message):
        render_chat(MESSAGES, tokenizer)


def test_an_alarm_that_was_set_before_goes_on(tokenizer):
    def ring(*_):
        raise AssertionError

    handler, timer = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, 7200, 60)
    try:
        render_chat(MESSAGES, tokenizer)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 3600 < left <= 7200 and interval == 60 and signal.getsignal(signal.SIGALRM) is ring
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def test_in_another_thread_it_is_rendered_without_a_limit(tokenizer):
    found = []
    thread = threading.Thread(target=lambda: found.append(render_chat(MESSAGES, tokenizer)))
    thread.start()
    thread.join()
    assert found == ["a<sep>b<eos>"]
