"""When an answer to a user's task is right: rules by name, for labels, numbers, exact text, patterns and free text."""

import abc
import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

from br_jax.core.errors import UserError, near_names, one_line

_SEARCHED = 10_000  # characters of an answer that a pattern sees

# What may stand around an answer without being a part of it; a leading period is not: ".5" is no "5".
_OPENING = " \"'`*_([{“‘«"  # noqa: RUF001
_CLOSING = " \"'`*_)]}”’».,:;!?…"  # noqa: RUF001
# A number: 1,234.5 or 1234.5 or .5 (but "No.5" holds a 5), and several with slashes between them.
_PART = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
_NUMBERS = {
    "value": (
        re.compile(r"the\s+final\s+answer\s+is\s*:", re.IGNORECASE),
        re.compile(rf"(?P<minus>(?<![\w)\]])[-\u2212])?\$?(?P<parts>{_PART}(?:/{_PART})*)"),
    ),
    "reference": (re.compile("The final answer is: "), re.compile(r"(?P<minus>-)?(?P<parts>[0-9]+(?:\.[0-9]+)?)")),
}


@dataclass(frozen=True)
class Rule(abc.ABC):
    """How well an answer does. Equal rules have equal reprs, which are a part of the key that scores are kept under."""

    matches: ClassVar[tuple[str, ...]] = ()  # what a rule's field `match` may be, if it has one

    def __post_init__(self):
        if self.matches and self.match not in self.matches:
            raise UserError(f"match is {self.match!r}; use one of {', '.join(self.matches)}")

    @abc.abstractmethod
    def score(self, answer: str, right: str) -> float:
        """From 0, wrong, to 1, right: a model's text against the row's own answer."""

    def with_match(self, match: str) -> "Rule":
        """The rule with another way to look at answers (a `UserError` if it knows no such way); "" leaves it."""
        if match and not self.matches:
            raise UserError(f"match is {match!r}, but {self} looks at answers in one way only; leave match empty")
        return dataclasses.replace(self, match=match) if match else self


@dataclass(frozen=True)
class LabelRule(Rule):
    """One of a few labels must be named; a row's right answer is one of them, spelled alike."""

    labels: tuple[str, ...]
    # "first": the first label that the answer names must be the right one. "reference": the right label, or of Sci/Tech
    # the first half, occurs anywhere, as it is, in lower case or capitalized.
    match: str = "first"
    matches: ClassVar[tuple[str, ...]] = ("first", "reference")

    def __post_init__(self):
        super().__post_init__()
        names = {label.strip().casefold() for label in self.labels} - {""}
        if not names or len(names) < len(self.labels):
            raise UserError(
                f"rule 'label': a label is empty, or two of {', '.join(self.labels) or 'none'} differ in case at most; "
                "write all of them, as label:positive,negative"
            )

    def score(self, answer: str, right: str) -> float:
        if self.match == "reference":
            enough = right.partition("/")[0]
            return float(any(spelling in answer for spelling in (enough, enough.lower(), enough.capitalize())))
        return float(first_label(answer, self.labels) == right)


@dataclass(frozen=True)
class NumberRule(Rule):
    """The answer's final number must be the one of the row's answer, found in the same way: GSM8K's rule.

    The final number is the first one after "The final answer is: ", else the last one of the text; an answer without a
    number is wrong. Values are compared exactly: 18.00 is 18, 3.14 is not 3.14159.
    """

    # "value" reads numbers as people write them: thousands separators (1,2 are two numbers), .5, 1/2 (but each part of
    # a date); a minus behind a letter, digit or bracket is no sign (10-18 ends with 18), one before "$" is; units, "$"
    # and "%" are passed over. "1e3", "1 000" and "1 1/2" begin with a 1. "reference" takes the phrase to the letter,
    # and as a number a minus, digits, a point and digits, once all commas are taken out.
    match: str = "value"
    matches: ClassVar[tuple[str, ...]] = ("value", "reference")

    def score(self, answer: str, right: str) -> float:
        found = final_number(answer, self.match)
        return float(found is not None and found == final_number(right, self.match))


@dataclass(frozen=True)
class ExactRule(Rule):
    """The answer must be the row's, but for case, white space and what may stand around it.

    Compared are casefolded texts in NFC, white space made single, without quotes, brackets, "*", "_" and "`" at both
    ends and ".,:;!?…" at the last. A text of nothing else keeps them: "" is no "?".
    """

    def score(self, answer: str, right: str) -> float:
        texts = (" ".join(unicodedata.normalize("NFC", text.casefold()).split()) for text in (answer, right))
        plain, wanted = (text.lstrip(_OPENING).rstrip(_CLOSING) or text for text in texts)
        return float(plain == wanted)


@dataclass(frozen=True)
class RegexRule(Rule):
    """What a pattern finds in the first 10,000 characters of an answer must be the right answer.

    What its first group holds counts, or all that it matches if it has no group, without white space around it. Where
    it matches the row's own answer too, that is taken from there in the same way; else it is the row's complete answer.
    """

    pattern: str

    def __post_init__(self):
        wrong = "" if self.pattern else "it is empty"
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            wrong = one_line(error)
        if wrong:
            raise UserError(f"rule 'regex': {self.pattern!r} is no pattern ({wrong}): write it as regex:([A-D])")

    def score(self, answer: str, right: str) -> float:
        matches = (re.search(self.pattern, text[:_SEARCHED]) for text in (answer, right))
        found, wanted = (match and match[1 if match.re.groups else 0] for match in matches)
        return float(found is not None and found.strip() == (right if wanted is None else wanted).strip())


@dataclass(frozen=True)
class RougeLRule(Rule):
    """ROUGE-L's F1 of the answer against the row's (Lin 2004), as google's rouge_score 0.1.2 with use_stemmer=False.

    Words are runs of a-z and 0-9 in the lower-cased text; text without any (Chinese, say) scores 0.
    """

    def score(self, answer: str, right: str) -> float:
        words, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, right))
        return 2 * _common_length(words, wanted) / (len(words) + len(wanted)) if words and wanted else 0.0


def parse_rule(text: str, labels: Sequence[str] = ()) -> Rule:
    """The rule that a config's string names; another one is a `UserError`.

    They are "label:positive,negative" (labels hold no comma; "label" alone takes `labels`), "number", "exact",
    "regex:PATTERN" and "rouge_l".
    """
    plain = {"number": NumberRule, "exact": ExactRule, "rouge_l": RougeLRule}
    name, colon, rest = text.partition(":")
    if name == "label":
        return LabelRule(tuple(label.strip() for label in rest.split(",")) if colon else tuple(labels))
    if name == "regex":
        return RegexRule(rest)
    if text not in plain:
        raise UserError(f"unknown rule {text!r}; {near_names(name, ['label', 'regex', *plain])}")
    return plain[text]()


def first_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names first, as a whole word in any case; None if it names none."""
    places = {label: re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.IGNORECASE) for label in labels}
    found = [(m.start(), -len(label), label) for label, m in places.items() if m]  # at one place the longer label wins
    return min(found)[2] if found else None


def final_number(text: str, match: str = "value") -> Fraction | None:
    """The number that a text comes to, see `NumberRule`; None if there is none."""
    phrase, pattern = _NUMBERS[match]
    text = text.replace(",", "") if match == "reference" else text

    def numbers(text: str) -> list[Fraction]:
        found = []
        for number in pattern.finditer(text):
            # Decimal takes any number of digits, where int stops at 4,300.
            parts = [Fraction(Decimal(part.replace(",", ""))) for part in number["parts"].split("/")]
            if len(parts) == 2 and parts[1]:
                parts = [parts[0] / parts[1]]
            found += [-parts[0] if number["minus"] else parts[0], *parts[1:]]
        return found

    behind = phrase.search(text)
    found = (numbers(text[behind.end() :])[:1] if behind else []) or numbers(text)[-1:]
    return found[0] if found else None


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence (Hyyrö, Bit-parallel LCS-length computation revisited, AWOCA 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    every = row = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return len(first) - row.bit_count()
