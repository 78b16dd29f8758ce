"""Tokenizers built on the spot: every byte a token, and a ChatML-like template with generation marks."""

import functools

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer(byte_level):
    """make_tokenizer(merges=(), bos=False, pad="<pad>", chat_template=...) -> PreTrainedTokenizerFast."""
    return functools.partial(byte_level, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def byte_tokenizer(make_tokenizer):
    """The plain one: no merges, no BOS added, <pad> and <eos>."""
    return make_tokenizer()
