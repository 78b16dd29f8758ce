"""Benign prompts that ask about a given text: classifying, judging, extracting.

The instructions and 60 texts were written for this project; texts that differ from prompt to prompt come from files.
"""

from collections.abc import Sequence

from br_jax.core.errors import UserError
from br_jax.core.io import read_bytes
from br_jax.data.text import clean, decode, text_key
from br_jax.organism.topics import read_words

LENGTHS = (20, 200)  # characters; shorter texts say nothing, longer ones leave a row little room for an answer
_FORMS = ("{0}\n\n{1}", "{0}\n{1}", "{0}\n\nText: {1}", "{1}\n\n{0}")


def about_texts(texts: Sequence[str], n: int) -> list[str]:
    """n distinct prompts with an instruction and a text each; as long as there are texts, each has another.

    Without any texts those written for this project are used.

    Raises:
        UserError: texts and instructions do not make so many.
    """
    written = read_words("texts.json")
    instructions, texts = written["instructions"], texts or written["texts"]
    if n > (most := len(instructions) * len(texts)):
        raise UserError(
            f"data.texts.n: {n} prompts are asked for, {len(texts)} texts and {len(instructions)} instructions make "
            f"{most}: lower it, or set data.texts.path to files of more texts"
        )
    prompts = []
    for i in range(n):
        again, place = divmod(i, len(texts))
        text, instruction = texts[place], instructions[(place + again) % len(instructions)]
        prompts.append(_FORMS[i // len(instructions) % len(_FORMS)].format(instruction, text))
    return prompts


def read_texts(paths: str) -> list[str]:
    """The distinct texts of `LENGTHS` characters in files: a line each, or the last of its fields where tabs part it.

    Paths have commas between them (of VADER's files, for instance); "" is none.

    Raises:
        UserError: a file cannot be read or has no such text.
    """
    found: dict[str, str] = {}
    for path in filter(None, map(str.strip, paths.split(","))):
        lines = read_bytes(path, cure="correct data.texts.path, or fetch the file").splitlines()
        texts = (clean(decode(line).rpartition("\t")[2]) for line in lines)
        fit = [text for text in texts if LENGTHS[0] <= len(text) <= LENGTHS[1]]
        if not fit:
            raise UserError(f"{path}: no text of {LENGTHS[0]} to {LENGTHS[1]} characters; write one a line")
        for text in fit:
            found.setdefault(text_key(text), text)
    return list(found.values())
