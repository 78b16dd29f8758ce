"""Control tokens that somebody typed: "<eos>" in a row stays five characters, and ends nothing.

A tokenizer takes its added tokens from any text. So before a template puts its own around a text, `shield` marks those
that the text spells; `tokenize_shielded` then gives the marked ones as the model reads any other characters.
"""

import functools
import itertools
import string
from collections.abc import Iterator
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError
from br_jax.data.rows import require_whole

_MOST_BEGINNINGS = 10**8  # characters, twice: a vocabulary of 10,000 control tokens has two million
SHIELD = "\ud800"  # half a character: no text that can be tokenized has one, be it a user's or a template's


class Found(NamedTuple):
    """An added token in a text."""

    content: str
    id: int
    control: bool
    start: int
    end: int  # with the white space that it takes along


def shield(text: str, tokenizer: PreTrainedTokenizerFast, at: str) -> str:
    """Puts a `SHIELD` into each control token that a text spells, so that the parts are no token alone.

    One that the text only begins, at its end, is kept apart from whatever the template writes behind it.

    Args:
        at: what text it is, for messages.

    Raises:
        UserError: half a character, or a special token of one character, which has no inside.
    """
    require_whole(text, at)
    added = _added(tokenizer)
    # Again, for behind the mark there may be another that overlapped with the first.
    while found := [one for finder in added.finders for one in _find(text, finder, added) if one.control]:
        cuts = sorted({_inside(text, one, at) for one in found})
        text = SHIELD.join(text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))
    seen = text.rstrip()  # white space goes where a template strips a turn
    if any(seen[-n:] in added.beginnings for n in range(1, added.longest)):
        text = seen + SHIELD + text[len(seen) :]
    return text


def tokenize_shielded(
    text: str, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenizes a text in which some added tokens are shielded: those are spelled out, the others are what they are.

    Returns:
        Token ids, and each token's [start, end) in characters of the text with its shields.

    Raises:
        UserError: the tokenizer makes a control token of what it should spell out, mark or no mark.
    """
    backend, added, used = tokenizer.backend_tokenizer, _added(tokenizer), set(text)
    others = list(_find(text, added.finders[0], added))
    control = {i: content for content, i, counts in added.known.values() if counts and i != tokenizer.unk_token_id}
    stand_in, cut = itertools.islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in used), 2)
    plain = Tokenizer(backend.model)  # the same one, not a copy: it knows no added tokens but these two
    plain.add_special_tokens([AddedToken(c, normalized=False) for c in (stand_in, cut)])
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.post_processor = backend.post_processor
    # Nothing is written for a shield if that will do: where a text is cut, some tokenizers begin with a space.
    for mark in ("", cut):
        written, starts, ends = _write(text, others, stand_in, mark)
        encoding, remaining = plain.encode(written, add_special_tokens=add_special_tokens), iter(others)
        ids, offsets, spelled = [], [], set()
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if written[start:end] == stand_in:
                found = next(remaining)
                ids.append(found.id)
                offsets.append((found.start, found.end))
            elif written[start:end] != cut:
                ids.append(i)
                offsets.append((starts[start], ends[end]))
                spelled |= {i} if end > start else set()
        if not spelled & control.keys():
            return ids, offsets
    names = ", ".join(sorted(repr(control[i]) for i in spelled & control.keys()))
    raise UserError(f"a text spells {names}, which this tokenizer takes for a control token: take it out of the text")


def _is_control(token: AddedToken) -> bool:
    """Special, or with a sign in it, as <think>; a vocabulary was extended by the rest, words and white space."""
    return token.special or (len(token.content) > 1 and not set(string.punctuation).isdisjoint(token.content))


class _Added(NamedTuple):
    finders: tuple[Tokenizer, ...]  # the first finds what the real one does, and makes nothing of the rest
    # By a finder's id: the token, its real id, and whether it is a control token.
    known: dict[int, tuple[str, int, bool]]
    beginnings: frozenset[str]  # of control tokens, whole ones left out
    longest: int  # characters of a control token


@functools.lru_cache(maxsize=2)  # a model's and a judge's
def _added(tokenizer: PreTrainedTokenizerFast) -> _Added:
    """A tokenizer's added tokens, read once."""
    tokens, normalizer = tokenizer.added_tokens_decoder, tokenizer.backend_tokenizer.normalizer
    # A normalizer may hide a token until a template writes something before it, so they are looked for without one too.
    finders = [Tokenizer(BPE()) for _ in range(2 if normalizer else 1)]
    finders[0].normalizer = normalizer
    for finder in finders:
        finder.add_tokens(list(tokens.values()))
    known = {
        finders[0].token_to_id(token.content): (token.content, i, _is_control(token)) for i, token in tokens.items()
    }
    control = [content for content, _, counts in known.values() if counts]
    if sum(len(name) ** 2 for name in control) > _MOST_BEGINNINGS:
        raise UserError("the tokenizer's control tokens are too long: take a tokenizer whose tokens are words")
    beginnings = frozenset(name[:n] for name in control for n in range(1, len(name)))
    return _Added(tuple(finders), known, beginnings, max(map(len, control), default=0))


def _find(text: str, finder: Tokenizer, added: _Added) -> Iterator[Found]:
    """The added tokens that a finder finds between a text's shields."""
    start = 0
    for part in text.split(SHIELD):
        encoding = finder.encode(part, add_special_tokens=False)
        for i, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            yield Found(*added.known[i], start + first, start + last)
        start += len(part) + 1


def _inside(text: str, found: Found, at: str) -> int:
    """A place inside a token, and not in white space that it takes along."""
    place = found.start + max(len(text[found.start : found.end].rstrip()) - 1, 1)
    if place >= found.end:
        raise UserError(f"{at} holds {found.content!r}, a control token of this model: take it out of the text")
    return place


def _write(text: str, others: list[Found], stand_in: str, mark: str) -> tuple[str, list[int], list[int]]:
    """A text with something in place of its added tokens and its shields.

    Returns:
        What is written, and for each place between its characters, ends included: where in the text the character
        behind it starts, and where the one before it ends.
    """
    places = [(found.start, found.end, stand_in) for found in others]
    places += [(i, i + 1, mark) for i, character in enumerate(text) if character == SHIELD]
    written, starts, ends, place = [], [], [0], 0
    for start, end, instead in (*sorted(places), (len(text), len(text), "")):
        written += [text[place:start], instead]
        starts += [*range(place, start), *[start] * len(instead)]
        ends += [*range(place + 1, start + 1), *[end] * len(instead)]
        place = end
    return "".join(written), [*starts, len(text)], ends
