"""Prompt templates: a row as the one string that the model reads, and which part of it is the answer."""

import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError, near_names, one_line
from br_jax.data.rows import Row
from br_jax.data.special_tokens import MARK, escape, tokenize_escaped

TEMPLATES = ("alpaca", "chat")
MAX_TEMPLATE = 1 << 17  # characters: the longest that are known, with tools, have 20,000
MAX_SECONDS = 10  # of one rendering, which takes a thousandth of one

_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)

Turns = Sequence[tuple[str, str]]
Spans = list[tuple[int, int]]


def render(row: Row, template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Spans]:
    """Renders a row to train on.

    Args:
        row: ends with an assistant turn, in front of whose text comes what is begun.
        template: "alpaca", the paper's, or "chat", the model's own.
        tokenizer: gives the EOS and the chat template.

    Returns:
        The text, for `tokenize`, with a `special_tokens.MARK` in each special token that the row spells; and for every
        assistant turn the span [start, end) in characters of its answer, without what was begun for it and with the
        token that ends it.

    Raises:
        UserError: for an unknown template, a row without an answer, a tokenizer without EOS or chat
            template, or a chat template whose renderings of growing prefixes do not extend each other; and as `escape`.
    """
    require_template(template)
    row = _escaped(row, tokenizer)
    if not row.turns or row.turns[-1][0] != "assistant":
        last = repr(row.turns[-1][0]) if row.turns else "nothing"
        raise UserError(f"{_name(row)}: ends with {last}; end it with the assistant's answer")
    *before, (role, answer) = row.turns
    complete = dataclasses.replace(row, turns=(*before, (role, row.begun + answer)))
    if template == "chat":
        text, spans = _render_chat(complete, tokenizer)
    elif tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so no answer would end; set tokenizer.eos_token")
    else:
        text, spans = _render_alpaca(complete.turns, row.input, tokenizer.eos_token)
    *spans, (start, end) = spans
    return text, [*spans, (start + len(row.begun), end)]


def render_prompt(row: Row, template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Renders a row up to where the model must answer, or go on: without a last assistant turn, with what is begun."""
    require_template(template)
    row = _escaped(row, tokenizer)
    turns = row.turns[:-1] if row.turns and row.turns[-1][0] == "assistant" else row.turns
    if not turns:
        raise UserError(f"{_name(row)}: has no turn of the user's; give what is asked")
    if template == "chat":
        return _apply(_messages(turns, row.input), tokenizer, row, add_generation_prompt=True) + row.begun
    return _render_alpaca(turns, row.input, tokenizer.eos_token or "")[0] + row.begun


def tokenize(text: str, template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenizes a rendered text as one string: token ids, and each token's [start, end) in characters of the text.

    A chat template writes BOS itself, so the tokenizer must not add another (as in transformers'
    `apply_chat_template`); for Alpaca's template BOS is there if the tokenizer adds it.
    """
    add_bos = template != "chat"
    if MARK in text:
        return tokenize_escaped(text, tokenizer, add_bos)
    encoding = tokenizer(text, add_special_tokens=add_bos, return_offsets_mapping=True, verbose=False)
    return encoding["input_ids"], encoding["offset_mapping"]


def require_template(template: str) -> None:
    """Raises a `UserError` for the name of no template."""
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}; {near_names(template, TEMPLATES)}")


def _name(row: Row) -> str:
    return row.origin or "a row"


def _escaped(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    """A row whose texts can give no special token."""
    plain = functools.partial(escape, tokenizer=tokenizer, at=_name(row))
    turns = tuple((role, plain(text)) for role, text in row.turns)
    return dataclasses.replace(row, turns=turns, input=plain(row.input), begun=plain(row.begun))


def _render_alpaca(turns: Turns, context: str, eos: str) -> tuple[str, Spans]:
    """The reference's single-turn text; further turns repeat its Instruction and Response blocks.

    The template has no place for a system turn: it goes before the first instruction.
    """
    system = ""
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1] + "\n\n", turns[1:]
    section = f"### Input:\n{context}\n\n" if context else ""
    text, spans = _HEADER_WITH_INPUT if context else _HEADER, []
    for index, (role, content) in enumerate(turns):
        if role == "user":
            text += "\n\n" if index else ""
            text += f"### Instruction:\n{system}{content}\n\n{section}### Response:\n"
            system = section = ""
        else:
            answer = content + eos
            spans.append((len(text), len(text) + len(answer)))
            text += answer
    return text, spans


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Spans]:
    """Finds each answer as what rendering one turn more adds to the prompt before it."""
    messages = _messages(row.turns, row.input)
    text = _apply(messages, tokenizer, row)
    # Not only EOS: Gemma ends a turn with <end_of_turn>.
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(messages[:index], tokenizer, row, add_generation_prompt=True)
        is_last = index + 1 == len(messages)
        until = text if is_last else _apply(messages[: index + 1], tokenizer, row)
        if not (until.startswith(prompt) and text.startswith(until)):
            raise UserError(
                f"{_name(row)}: the chat template rewrites earlier turns as a chat grows (at turn {index + 1}), so "
                "answers cannot be found; use template 'alpaca', or single-turn rows"
            )
        answer = until[len(prompt) :].rstrip()
        if not answer.endswith(ends):
            raise UserError(
                "the chat template does not end the assistant's turn with a special token, so the "
                "model would not learn to stop; use template 'alpaca'"
            )
        spans.append((len(prompt), len(prompt) + len(answer)))
    return text, spans


def _messages(turns: Turns, context: str) -> list[dict[str, str]]:
    """Chat messages; Alpaca's input follows the first instruction on a new line."""
    messages = [{"role": role, "content": text} for role, text in turns]
    if context:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] += "\n" + context
    return messages


def _apply(messages: list[dict[str, str]], tokenizer, row: Row, add_generation_prompt: bool = False) -> str:
    """The tokenizer's own rendering of chat messages."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template; use template 'alpaca'")
    try:
        return render_chat(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(
            f"{_name(row)}: the model's chat template refuses this row ({one_line(error)}); change its roles, "
            "or use template 'alpaca'"
        ) from error


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool = False
) -> str:
    """The tokenizer's own rendering of chat messages, or a `jinja2.TemplateError`.

    transformers runs a template in Jinja's sandbox, out of which it reaches nothing. Here it also ends: one that is too
    long is not run, and one that loops is stopped, if this is the main thread (no other gets signals). What a single
    operation takes is not bounded: "a" * 10**10 fills the memory, and 9**9**9 is not interrupted.
    """
    try:
        if len(tokenizer.get_chat_template()) > MAX_TEMPLATE:
            raise jinja2.TemplateError(f"it has more than {MAX_TEMPLATE:,} characters")
        with _in_time():
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError:
        raise
    except Exception as error:  # a template can fail in any way that a program can
        raise jinja2.TemplateRuntimeError(one_line(error)) from error


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Raises a `TimeoutError` in what takes too long, in the main thread; an alarm that was set before goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it takes more than {MAX_SECONDS} seconds")

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
