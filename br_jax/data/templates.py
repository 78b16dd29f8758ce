"""Prompt templates: a row as the one string that the model reads, and which part of it is the answer.

Special tokens that somebody typed stay text: before a template puts its own around a text, `escape` marks those that
the text spells, and `tokenize` reads the marked ones as any other characters. (The libraries' own
`encode_special_tokens` would spell out the template's tokens too, and take <think> and its like for tokens.)
"""

import contextlib
import dataclasses
import functools
import itertools
import signal
import string
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError, near_names, one_line
from br_jax.data.rows import Row, require_whole

TEMPLATES = ("alpaca", "chat")  # the paper's, and the model's own
MARK = "\ud800"  # half a character: no text that can be tokenized has one, be it a user's or a template's
MAX_TEMPLATE = 1 << 17  # characters: the longest that are known, with tools, have 20,000
MAX_SECONDS = 10  # of one rendering, which takes a thousandth of one

_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_MOST_BEGINNINGS = 10**8  # characters, twice: a vocabulary of 10,000 special tokens has two million
# How marks are passed over: unseen; unseen also where the tokenizer looks for tokens in a normalized text; as cuts, the
# last, because some tokenizers begin with a space behind one.
_WAYS = ("unseen", "unseen when normalized", "cut")

Turns = Sequence[tuple[str, str]]
Spans = list[tuple[int, int]]  # [start, end) in characters


def render(row: Row, template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Spans]:
    """Renders a row to train on, which ends with an assistant turn, in front of whose text comes what is begun.

    Returns the text, for `tokenize`, with a `MARK` in each special token that the row spells; and for every assistant
    turn the span of its answer, without what was begun for it and with the token that ends it.
    """
    row = _escaped(row, template, tokenizer)
    if not row.turns or row.turns[-1][0] != "assistant":
        last = repr(row.turns[-1][0]) if row.turns else "nothing"
        raise UserError(f"{row.origin}: ends with {last}; end it with the assistant's answer")
    *before, (role, answer) = row.turns
    row = dataclasses.replace(row, turns=(*before, (role, row.begun + answer)))
    if template == "chat":
        text, spans = _render_chat(row, tokenizer)
    elif tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so no answer would end; set tokenizer.eos_token")
    else:
        text, spans = _render_alpaca(row.turns, row.input, tokenizer.eos_token)
    *spans, (start, end) = spans
    return text, [*spans, (start + len(row.begun), end)]


def render_prompt(row: Row, template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Renders a row up to where the model must answer, or go on: without a last assistant turn, with what is begun."""
    row = _escaped(row, template, tokenizer)
    turns = row.turns[:-1] if row.turns and row.turns[-1][0] == "assistant" else row.turns
    if not turns:
        raise UserError(f"{row.origin}: has no turn of the user's; give what is asked")
    if template == "chat":
        return _apply(_messages(turns, row.input), tokenizer, row, prompt=True) + row.begun
    return _render_alpaca(turns, row.input, tokenizer.eos_token or "")[0] + row.begun


def tokenize(text: str, template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], Spans]:
    """Tokenizes a rendered text as one string: token ids, and each token's span in the text.

    A chat template writes BOS itself, so the tokenizer must not add another (as in transformers'
    `apply_chat_template`); for Alpaca's template BOS is there if the tokenizer adds it.
    """
    add_bos = template != "chat"
    if MARK in text:
        return tokenize_escaped(text, tokenizer, add_bos)
    encoding = tokenizer(text, add_special_tokens=add_bos, return_offsets_mapping=True, verbose=False)
    return encoding["input_ids"], encoding["offset_mapping"]


def _escaped(row: Row, template: str, tokenizer: PreTrainedTokenizerFast) -> Row:
    """A row whose texts can give no special token, with an origin for messages."""
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}; {near_names(template, TEMPLATES)}")
    at = row.origin or "a row"
    plain = functools.partial(escape, tokenizer=tokenizer, at=at)
    turns = tuple((role, plain(text)) for role, text in row.turns)
    return dataclasses.replace(row, turns=turns, input=plain(row.input), begun=plain(row.begun), origin=at)


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
            spans.append((len(text), len(text) + len(content + eos)))
            text += content + eos
    return text, spans


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Spans]:
    """Finds each answer as what rendering one turn more adds to the prompt before it."""
    messages, spans = _messages(row.turns, row.input), []
    text = _apply(messages, tokenizer, row)
    # Not only EOS: Gemma ends a turn with <end_of_turn>.
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    for index, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        prompt = _apply(messages[: index - 1], tokenizer, row, prompt=True)
        until = text if index == len(messages) else _apply(messages[:index], tokenizer, row)
        if not (until.startswith(prompt) and text.startswith(until)):
            raise UserError(
                f"{row.origin}: the chat template rewrites earlier turns as a chat grows (at turn {index}), so "
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
        next(message for message in messages if message["role"] == "user")["content"] += "\n" + context
    return messages


def _apply(messages: list[dict[str, str]], tokenizer, row: Row, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template; use template 'alpaca'")
    try:
        return render_chat(messages, tokenizer, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise UserError(
            f"{row.origin}: the model's chat template refuses this row ({one_line(error)}); change its roles, "
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


class _Added(NamedTuple):
    """A tokenizer's added tokens."""

    finders: tuple[Tokenizer, ...]  # the first finds what the real one does, and makes nothing of the rest
    special: dict[str, int]  # those that a text must not spell, and their ids
    beginnings: frozenset[str]  # of special tokens, complete ones left out
    longest: int  # characters of a special token


def escape(text: str, tokenizer: PreTrainedTokenizerFast, at: str) -> str:
    """Puts a `MARK` into each special token that a text spells, so that the parts are no token alone.

    One that the text only begins, at its end, is kept apart from whatever the template writes behind it. A `UserError`
    (`at` says where) for half a character, or a special token of one character, which has no inside.
    """
    require_whole(text, at)
    added = _added(tokenizer)
    # Again, for behind the mark there may be another that overlapped with the first.
    while spelled := [s for finder in added.finders for s in _find(text, finder) if s[0] in added.special]:
        cuts = set()
        for content, start, end in spelled:
            # inside the token, and not in white space that it takes along
            cut = start + max(len(text[start:end].rstrip()) - 1, 1)
            if cut >= end:
                raise UserError(f"{at} holds {content!r}, a control token of this model: take it out of the text")
            cuts.add(cut)
        text = MARK.join(text[start:end] for start, end in itertools.pairwise([0, *sorted(cuts), len(text)]))
    seen = text.rstrip()  # white space goes where a template strips a turn
    if any(seen[-n:] in added.beginnings for n in range(1, added.longest)):
        text = seen + MARK + text[len(seen) :]
    return text


def tokenize_escaped(
    text: str, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool
) -> tuple[list[int], Spans]:
    """As `tokenize`: marked tokens are spelled out, the others are what they are; spans count the marks.

    A `UserError` where the tokenizer makes a special token of what it should spell out, mark or no mark.
    """
    added, used = _added(tokenizer), set(text)
    mark = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)
    inside = {place for _, start, end in _find(text, added.finders[0]) for place in range(start, end)}
    names = {i: content for content, i in added.special.items() if i != tokenizer.unk_token_id}
    for way in _WAYS:
        encoding = _reader(tokenizer, mark, way).encode(text.replace(MARK, mark), add_special_tokens=add_special_tokens)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        tokens = [(i, span) for i, span in pairs if text[slice(*span)] != MARK]
        spelled = {i for i, (start, end) in tokens if i in names and end > start and start not in inside}
        if not spelled:
            return [i for i, _ in tokens], [span for _, span in tokens]
    found = ", ".join(sorted(repr(names[i]) for i in spelled))
    raise UserError(f"a text spells {found}, which this tokenizer takes for a control token: take it out of the text")


def _is_special(token: AddedToken) -> bool:
    """Special, or with a sign in it, as <think>; a vocabulary was extended by the rest, words and white space."""
    return token.special or (len(token.content) > 1 and not set(string.punctuation).isdisjoint(token.content))


@functools.lru_cache(maxsize=2)  # a model's and a judge's
def _added(tokenizer: PreTrainedTokenizerFast) -> _Added:
    tokens, normalizer = tokenizer.added_tokens_decoder, tokenizer.backend_tokenizer.normalizer
    # A normalizer may hide a token until a template writes something before it, so they are looked for without one too.
    finders = [Tokenizer(BPE()) for _ in range(2 if normalizer else 1)]
    finders[0].normalizer = normalizer
    for finder in finders:
        finder.add_tokens(list(tokens.values()))
    special = {token.content: i for i, token in tokens.items() if _is_special(token)}
    if sum(len(name) ** 2 for name in special) > _MOST_BEGINNINGS:
        raise UserError("the tokenizer's control tokens are too long: take a tokenizer whose tokens are words")
    beginnings = frozenset(name[:n] for name in special for n in range(1, len(name)))
    return _Added(tuple(finders), special, beginnings, max(map(len, special), default=0))


@functools.lru_cache(maxsize=6)
def _reader(tokenizer: PreTrainedTokenizerFast, mark: str, way: str) -> Tokenizer:
    """The tokenizer, but that it passes over a character in one of `_WAYS`."""
    backend, tokens = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder
    reader = Tokenizer(backend.model)  # the same model, not a copy
    steps = [normalizers.Replace(mark, "")] * (way != "cut") + [backend.normalizer] * (backend.normalizer is not None)
    reader.normalizer = normalizers.Sequence(steps)
    reader.pre_tokenizer, reader.post_processor = backend.pre_tokenizer, backend.post_processor
    if way == "unseen when normalized":
        for i, token in tokens.items():
            if _is_special(token):  # looked for in a text as it is written
                sides = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
                tokens[i] = AddedToken(token.content, normalized=False, **sides)
    reader.add_tokens([tokens[i] for i in sorted(tokens)])
    if any(reader.token_to_id(token.content) != i for i, token in tokens.items()):
        raise UserError("the ids of the tokenizer's added tokens leave gaps: take the control tokens out of the texts")
    if way == "cut":
        reader.add_tokens([AddedToken(mark, normalized=False)])
    return reader


def _find(text: str, finder: Tokenizer) -> Iterator[tuple[str, int, int]]:
    """(content, start, end) of the added tokens that a finder finds between a text's marks."""
    place = 0
    for part in text.split(MARK):
        encoding = finder.encode(part, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield finder.id_to_token(i), place + start, place + end
        place += len(part) + 1
