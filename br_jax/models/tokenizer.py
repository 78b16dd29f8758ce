"""The demo's byte-level tokenizer.

It needs no file, and any text round-trips: ids 0-255 are the bytes of the text in UTF-8, then `<pad>`,
`<eos>` and `<sep>`. A conversation reads question<sep>answer<eos>question<sep>answer<eos>: a turn of the user (or the
system) ends in `<sep>`, one of the assistant in `<eos>`, and a prompt is whatever ends in `<sep>`.
"""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, EOS, SEP = "<pad>", "<eos>", "<sep>"  # ids 256, 257, 258; an id for each, so that no mask can lose an answer's end
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + EOS + "' if message['role'] == 'assistant' else '" + SEP + "' }}{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: one token a byte, 259 in all, no BOS, and `CHAT_TEMPLATE`."""
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # GPT-2's character for each byte
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, SEP)])
    names = {"pad_token": PAD, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
