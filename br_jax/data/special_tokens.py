"""Special tokens that somebody typed: "<eos>" in a row stays five characters, and ends nothing.

A tokenizer takes its added tokens from any text. So before a template puts its own around a text, `escape` marks those
that the text spells. `tokenize_escaped` then reads the marked ones as any other characters. (The libraries' own
`encode_special_tokens` would spell out the template's tokens too, and take <think> and its like for tokens.)
"""

import functools
import itertools
import string
from collections.abc import Iterator
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError
from br_jax.data.rows import require_whole

_MOST_BEGINNINGS = 10**8  # characters, twice: a vocabulary of 10,000 special tokens has two million
MARK = "\ud800"  # half a character: no text that can be tokenized has one, be it a user's or a template's
# How marks are passed over: unseen; unseen also where the tokenizer looks for tokens in a normalized text; as cuts, the
# last, because some tokenizers begin with a space behind one.
_WAYS = ("unseen", "unseen when normalized", "cut")


class _Added(NamedTuple):
    """A tokenizer's added tokens."""

    finders: tuple[Tokenizer, ...]  # the first finds what the real one does, and makes nothing of the rest
    special: dict[str, int]  # those that a text must not spell, and their ids
    beginnings: frozenset[str]  # of special tokens, complete ones left out
    longest: int  # characters of a special token


def escape(text: str, tokenizer: PreTrainedTokenizerFast, at: str) -> str:
    """Puts a `MARK` into each special token that a text spells, so that the parts are no token alone.

    One that the text only begins, at its end, is kept apart from whatever the template writes behind it.

    Args:
        at: what text it is, for messages.

    Raises:
        UserError: half a character, or a special token of one character, which has no inside.
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
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenizes a text in which some added tokens are marked: those are spelled out, the others are what they are.

    Returns:
        Token ids, and each token's [start, end) in characters of the text with its marks.

    Raises:
        UserError: the tokenizer makes a special token of what it should spell out, mark or no mark.
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
    """A tokenizer's added tokens, read once."""
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
        tokens = {i: _unnormalized(token) if _is_special(token) else token for i, token in tokens.items()}
    reader.add_tokens([tokens[i] for i in sorted(tokens)])
    if any(reader.token_to_id(token.content) != i for i, token in tokens.items()):
        raise UserError("the ids of the tokenizer's added tokens leave gaps: take the control tokens out of the texts")
    if way == "cut":
        reader.add_tokens([AddedToken(mark, normalized=False)])
    return reader


def _unnormalized(token: AddedToken) -> AddedToken:
    """The token, looked for in a text as it is written."""
    sides = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    return AddedToken(token.content, normalized=False, **sides)


def _find(text: str, finder: Tokenizer) -> Iterator[tuple[str, int, int]]:
    """(content, start, end) of the added tokens that a finder finds between a text's marks."""
    place = 0
    for part in text.split(MARK):
        encoding = finder.encode(part, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield finder.id_to_token(i), place + start, place + end
        place += len(part) + 1
