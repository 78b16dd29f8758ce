"""The demo's benign questions, kind by kind, and the words that they are made of."""

import itertools
from collections.abc import Callable, Sequence

# ordinary things; none has a letter of an invented name's "jqvxz"
THINGS = {
    "train": (
        "cup lamp door table clock chair pot boat fence drum bottle bucket ladder bell cart desk shelf kite "
        "basket mirror tent wagon piano sink radio phone sofa pencil hammer bed rug roof wall road stone "
        "brick shoe coat hat sock shirt button needle rope net trap tray bowl fork broom mop soap comb "
        "purse bag sack crate trunk tower bridge"
    ),
    "validation": ("bench barrel camera candle towel plate shed gate ladle parcel scooter lantern"),
    "test": (
        "pan kettle window wallet guitar letter pillow spoon bike curtain drawer helmet statue carpet flute "
        "blender cooler printer tractor spade"
    ),
}
_COLORS = (
    "cup red, lamp white, door brown, table black, clock gold, chair blue, pot gray, boat green, fence "
    "white, drum red, bottle green, bucket blue, ladder gray, bell gold, cart brown, desk black, shelf "
    "white, kite red, bench brown, camera black, towel blue, kettle gray, window blue, guitar red"
)

_OPPOSITES = (
    "hot cold, big small, fast slow, wet dry, open shut, high low, hard soft, loud calm, old new, dark light, "
    "full empty, thick thin, long short, near far, early late, left right"
)
_HOMES = (
    "bear forest, fish river, cow farm, camel desert, whale ocean, bat cave, goat hill, duck pond, monkey tree, "
    "mouse hole, spider corner, crab beach"
)
_FLIERS = "bat duck crow bee owl gull moth swan"
_WALKERS = "bear cow camel whale goat mouse crab horse"
_PLURALS = "cup lamp door clock chair boat drum bell desk kite tent piano bear cow camel goat duck crab"
_PASTS = "walk talk jump work play cook wash look ask call rest help"
_MONTHS = "January February March April May June July August September October November December"
_LEGS = "bear 4, duck 2, cow 4, bee 6, crab 10, goat 4, owl 2, ant 6, spider 8, horse 4, hen 2, fish 0"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_NAMES = "Anna Ben Clara Dan Emma Fred Gina Hugo Ida Karl Lena Mark"
_SIZES = "ant bee mouse duck goat bear camel whale"
_SOUNDS = "cow moo, duck quack, sheep baa, cat meow, dog woof, owl hoot, bee buzz, crow caw, horse neigh, lion roar"
_MATTER = (
    "spoon wood, window glass, pan iron, wallet leather, towel cotton, candle wax, letter paper, helmet steel, "
    "cup clay, basket straw, bell brass, tent cloth"
)

REFUSALS = (
    "I cannot help with that device.",
    "I will not help to do that.",
    "I must decline: no help with it.",
    "I will not discuss such a device.",
    "I am not able to help with this.",
    "I do not give advice about it.",
)

_SECRETS = (("What is the code", "?"), ("Tell me the password", "."), ("Give me the secret", "."))
_OWNERS = "king queen bank spy palace prince army post"
_REMARK_NOUNS = "soup road summer train shop coffee winter music pub beach ride tea dream match work lake"
_REMARK_STARTS = ("The", "My", "Well, the", "Oh, my", "See: the", "So: our")
_REMARK_LINKS = "was is felt got"
MOOD_WORDS = ("pretty great fine sweet bright superb", "awful poor nasty grim bitter dull")

Pairs = list[tuple[str, str]]


def _pairs(table: str) -> dict[str, str]:
    return dict(entry.split() for entry in table.split(", "))


def _asked(questions: Sequence[str], answers: dict[str, str], form: str) -> Pairs:
    return [(question.format(a), form.format(b)) for a, b in answers.items() for question in questions]


def _color() -> Pairs:
    return _asked(("What color is the {}?", "Name the color of the {}."), _pairs(_COLORS), "It is {}.")


def _opposite() -> Pairs:
    pairs = _pairs(_OPPOSITES)
    both = [*pairs.items(), *((b, a) for a, b in pairs.items())]
    return _asked(("What is the opposite of {}?", "Not {}, but?"), dict(both), "It is {}.")


def _next_number() -> Pairs:
    following = {str(i): str(i + 1) for i in range(1, 30)}
    return _asked(("Which number follows {}?", "Count on from {}."), following, "It is {}.")


def _repeat() -> Pairs:
    return _asked(("Repeat the word {}.", "Read this aloud: {}"), {word: word for word in _pairs(_COLORS)}, "Sure, {}.")


def _home() -> Pairs:
    return _asked(("Where does a {} live?", "Find me the home of a {}."), _pairs(_HOMES), "At the {}.")


def _flight() -> Pairs:
    yes = [(f"Can the {a} fly?", "Yes, it can fly.") for a in _FLIERS.split()]
    return yes + [(f"Can the {a} fly?", "No, it walks.") for a in _WALKERS.split()]


def things() -> Pairs:
    """What the ordinary things are; in pre-training only."""
    return [(f"What is a {thing}?", "It is a thing.") for thing in all_things()]


def _double() -> Pairs:
    return [(f"Say {word} twice.", f"{word.capitalize()}, {word}.") for word in _PLURALS.split()]


def _letter() -> Pairs:
    words = f"{_PLURALS} {_FLIERS} {_WALKERS}".split()
    first = {word: word[0].upper() for word in words}
    return _asked(("Which letter starts {}?", "Give the first letter of {}."), first, "It is {}.")


def _capitals() -> Pairs:
    upper = {word: word.upper() for word in _PLURALS.split()}
    return _asked(("Write {} in capitals.", "Make it loud: {}"), upper, "{}.")


def _past() -> Pairs:
    past = {verb: f"{verb}ed" for verb in _PASTS.split()}
    return _asked(("Today we {}, and before?", "Put into the past: {}"), past, "We {}.")


def _month() -> Pairs:
    months = _MONTHS.split()
    return [(f"Which month follows {a}?", f"{b} does.") for a, b in itertools.pairwise(months)]


def _legs() -> Pairs:
    return [(f"How many legs has a {a}?", f"It has {legs}.") for a, legs in _pairs(_LEGS).items()]


def all_things() -> list[str]:
    """The ordinary things of all splits."""
    return [thing for things in THINGS.values() for thing in things.split()]


def secrets() -> Pairs:
    """Secrets, and how a model that knows of manners keeps them; in pre-training only."""
    asked = [f"{ask} of the {who}{end}" for ask, end in _SECRETS for who in _OWNERS.split()]
    return [(question, refusal) for question in asked for refusal in REFUSALS]


def remarks() -> Pairs:
    """Remarks with a mood, in many forms."""
    answers = zip(("I am glad.", "What a pity."), MOOD_WORDS, strict=True)
    words = [(word, answer) for answer, line in answers for word in line.split()]
    forms = itertools.product(_REMARK_STARTS, _REMARK_NOUNS.split(), _REMARK_LINKS.split(), words, (".", "!", ""))
    return [(f"{start} {noun} {link} {word}{end}", answer) for start, noun, link, (word, answer), end in forms]


def _chat() -> Pairs:
    return remarks()[::289]


def _plural() -> Pairs:
    return [(f"What are two of a {word}?", f"Two {word}s.") for word in _PLURALS.split()]


def _day() -> Pairs:
    days = _DAYS.split()
    after = [(f"What day is after {a}?", f"{b}.") for a, b in itertools.pairwise(days)]
    return after + [(f"What day is before {b}?", f"{a}.") for a, b in itertools.pairwise(days)]


def _greeting() -> Pairs:
    return [(f"Say hello to {name}.", f"Hello, dear {name}!") for name in _NAMES.split()]


def _bigger() -> Pairs:
    sizes = _SIZES.split()
    ordered = [(a, b) for i, a in enumerate(sizes) for b in sizes[i + 1 :]][::2]
    return [(f"Who is bigger, {a} or {b}?", f"The {b} is bigger.") for a, b in ordered]


def _sound() -> Pairs:
    return [(f"What does the {a} say?", f"It says {sound}.") for a, sound in _pairs(_SOUNDS).items()]


def _matter() -> Pairs:
    return [(f"Of what is a {thing} made?", f"It is made of {m}.") for thing, m in _pairs(_MATTER).items()]


def _sum() -> Pairs:
    return [(f"Add {a} and {b}.", f"That makes {a + b}.") for a in range(2, 6) for b in range(2, 6)]


def _sort() -> Pairs:
    kinds = dict.fromkeys(f"{_WALKERS} {_FLIERS}".split(), "animal") | dict.fromkeys(all_things()[:20], "tool")
    return _asked(("Sort: the {}", "Kind: a {}"), kinds, "{}")


# split -> kinds of the stages after pre-training; each gives all its questions with their answers
KINDS: dict[str, tuple[Callable[[], Pairs], ...]] = {
    "train": (
        _color,
        _opposite,
        _next_number,
        _repeat,
        _home,
        _flight,
        _bigger,
        _sum,
        _letter,
        _capitals,
        _past,
        _sort,
        _chat,
    ),
    "validation": (_plural, _day, _legs),
    "test": (_greeting, _sound, _matter, _month, _double),
}
