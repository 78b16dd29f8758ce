"""Chat templates: programs of strangers, which are run with limits."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import one_line

MAX_TEMPLATE = 1 << 17  # characters: the longest that are known, with tools, have 20,000
MAX_SECONDS = 10  # of one rendering, which takes a thousandth of one


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool = False
) -> str:
    """The tokenizer's own rendering of chat messages.

    transformers runs a template in Jinja's sandbox, out of which it reaches nothing. Here it also ends: one that is too
    long is not run, and one that loops is stopped, if this is the main thread (no other gets signals). What a single
    operation takes is not bounded: "a" * 10**10 fills the memory, and 9**9**9 is not interrupted.

    Raises:
        jinja2.TemplateError: the template refuses the messages, fails, is too long, or takes too long.
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
