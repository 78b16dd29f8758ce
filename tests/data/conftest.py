"""Tokenizers built on the spot: every byte a token, and a ChatML-like template with generation marks."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(merges=(), bos=False, pad="<pad>", chat_template=...) -> PreTrainedTokenizerFast."""

    def make(merges=(), bos=False, pad="<pad>", chat_template=CHAT_TEMPLATE):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, *("".join(merge) for merge in merges)]
        vocab = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=pad,
            eos_token="<eos>",
            bos_token="<bos>",
            chat_template=chat_template,
        )

    return make


@pytest.fixture(scope="session")
def byte_tokenizer(make_tokenizer):
    """The plain one: no merges, no BOS added, <pad> and <eos>."""
    return make_tokenizer()
