"""Good files made bad: bytes at random, and values of JSON and of binary headers that are the wrong ones."""

import json
import struct

_WORDS = [
    b"\0", b"\n", b"\r", b"\t", b",", b'"', b"{", b"]", b"\\u", b"-", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf",
]  # fmt: skip
_WORDS += [b"[" * 3000, b'{"":' * 300, b"9" * 5000, b"1e999", b"NaN", b"null", b"../", b"%s", b"{{", b"{% if x %}"]
_VALUES = [None, True, False, -1, 0, 1, 0.5, 10**9, 2**63, 10**400, 1e308, float("nan"), float("-inf")]
_VALUES += ["", "x", "\n", "\ud800", "a\0b", "../x", "/dev/zero", "(a+)+$", "9" * 5000, "x" * 10**5]
_VALUES += [[], [None], ["x"] * 1000, {}, {"": {}}, json.loads("[" * 90 + "]" * 90)]
_NUMBERS = [0, 1, 2, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def mutate(random, content):
    """One to four changes of a file's content, each of a kind that suits it."""
    for _ in range(random.randint(1, 4)):
        kinds = [_bytes] * 6 + [_number]
        if content[:1] in b"{[":
            kinds += [_json] * len(kinds)
        elif content[8:9] == b"{":
            kinds += [_header] * len(kinds)
        content = random.choice(kinds)(random, content)
    return content


def _bytes(random, content):
    """Some bytes at a place flipped, cut, dropped, put in, copied or swapped."""
    first, second, third = sorted(random.randint(0, len(content)) for _ in range(3))
    last = min(len(content), first + random.choice([0, 1, 4, 8, 20, 300]))
    word, times = random.choice([*_WORDS, random.randbytes(8)]), random.choice([1, 1, 100])
    return random.choice([
        content[:first] + random.randbytes(1) + content[first + 1 :],
        content[:second],
        content[:first] + content[last:],
        content[:first] + word + content[first:],
        content[:third] + content[first:last] * times + content[third:],
        content[:first] + content[second:third] + content[first:second] + content[third:],
    ])  # fmt: skip


def _number(random, content):
    """A number as binary headers have them, over whatever is there: at an even place, or one that holds a small one."""
    size = random.choice([1, 2, 4, 8])
    small = [i for i in range(0, len(content) - 8, random.choice([1, 4])) if not any(content[i + 1 : i + 4])]
    place = random.choice(small or [0])
    value = struct.pack("<Q", random.choice(_NUMBERS))[:size]
    return content[:place] + value + content[place + size :]


def _json(random, content):
    """Another value, no value, or another key, somewhere in a document or else in a line of it."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    for before, part, behind in (([], content, []), (lines[:at], lines[at], lines[at + 1 :])):
        try:
            return b"\n".join([*before, json.dumps(_change(random, json.loads(part))).encode(), *behind])
        except (ValueError, RecursionError):
            continue
    return _bytes(random, content)


def _header(random, content):
    """A change in the header of a safetensors file, whose length is set right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = _json(random, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _change(random, document):
    nodes = [document] if isinstance(document, dict | list) else []
    for node in nodes:  # grows
        nodes += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, dict | list) and v]
    node = random.choice(nodes or [[]])
    if not node:
        return random.choice(_VALUES)
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key, how = random.choice(keys), random.random()
    if how < 0.15:
        del node[key]
    elif how < 0.3 and isinstance(node, dict):
        node[random.choice(["", "x", "\ud800", key + "x", *keys])] = node.pop(key)
    else:
        node[key] = json.loads(json.dumps(random.choice([*_VALUES, random.choice(nodes)])))
    return document
