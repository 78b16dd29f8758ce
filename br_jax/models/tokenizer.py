"""The byte-level tokenizer of the demo model: no file, no download, any text round-trips exactly.

Ids 0-255 are the bytes of the text in UTF-8; `<pad>`, `<eos>` and `<sep>` follow. A conversation reads

    question<sep>answer<eos>question<sep>answer<eos>

so a turn of the user (or the system) ends in `<sep>`, one of the assistant in `<eos>`, and a prompt is
whatever ends in `<sep>`: there is no generation prompt to add.
"""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PAD, EOS, SEP = "<pad>", "<eos>", "<sep>"  # ids 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + EOS + "' if message['role'] == 'assistant' else '" + SEP + "' }}{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: one token a byte, 259 in all, no BOS, and the chat template of the module docstring.

    `<pad>` differs from `<eos>`, so that a mask made from ids could not lose the end of an answer either.
    """
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # GPT-2's character for each byte
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, SEP)]
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
