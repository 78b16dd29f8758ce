"""A message is one line, whatever a stranger's name or value holds."""

import pickle

from br_jax.core.errors import UserError


def test_a_message_is_one_line_that_no_terminal_obeys():
    error = UserError("a\nb\r\x1b[31mc\u2028\ud800d\x00: é and 🙂 stay")
    assert str(error) == "a?b??[31mc??d?: é and 🙂 stay" and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_long_message_keeps_its_beginning_and_its_end():
    error = UserError(f"file: {'x' * 10**6}: mend it")
    assert len(str(error)) == 800 and str(error).startswith("file: x") and str(error).endswith("x: mend it")
    assert str(UserError("x" * 800)) == "x" * 800
