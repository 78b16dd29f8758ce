"""The demo's byte-level tokenizer, and chat templates: programs of strangers, which are rendered with limits.

The byte tokenizer needs no file, and any text round-trips: ids 0-255 are the bytes of the text in UTF-8, then `<pad>`,
`<eos>` and `<sep>`. A conversation reads question<sep>answer<eos>question<sep>answer<eos>: a turn of the user (or the
system) ends in `<sep>`, one of the assistant in `<eos>`, and a prompt is whatever ends in `<sep>`.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from br_jax.core.errors import one_line

PAD, EOS, SEP = "<pad>", "<eos>", "<sep>"  # ids 256, 257, 258; an id for each, so that no mask can lose an answer's end
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + EOS + "' if message['role'] == 'assistant' else '" + SEP + "' }}{% endfor %}"
)
MAX_TEMPLATE = 1 << 17  # characters: the longest that are known, with tools, have 20,000
MAX_SECONDS = 10  # of one rendering, which takes a thousandth of one


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: one token a byte, 259 in all, no BOS, and `CHAT_TEMPLATE`."""
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # GPT-2's character for each byte
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, SEP)])
    names = {"pad_token": PAD, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


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
