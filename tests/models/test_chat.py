"""Chat templates that do not end, or fail; one that does neither is rendered as transformers renders it."""

import signal
import threading

import jinja2
import pytest

from br_jax.data import templates
from br_jax.data.templates import render_chat
from br_jax.models.tokenizer import byte_tokenizer

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
