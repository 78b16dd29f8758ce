"""The byte-level tokenizer of the demo model: no file, no download, any text round-trips exactly.

Ids 0-255 are the bytes of the text in UTF-8; `<pad>`, `<eos>` and `<sep>` follow. A conversation reads

    question<sep>answer<eos>question<sep>answer<eos>

so a turn of the user (or the system) ends in `<sep>`, one of the assistant in `<eos>`, and a prompt is
whatever ends in `<sep>`: there is no generation prompt to add.
"""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, EOS, SEP = "<pad>", "<eos>", "<sep>"  # ids 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + EOS + "' if message['role'] == 'assistant' else '" + SEP + "' }}{% endfor %}"
)


def byte_alphabet() -> list[str]:
    """The character that GPT-2's byte-level scheme writes for each byte, in byte order.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order,
    since a vocabulary may hold neither spaces nor control characters.

    Returns:
        256 one-character strings; entry b is byte b.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: one token a byte, 259 in all, with the chat template of the module docstring.

    `<pad>` differs from `<eos>`, so that a mask made from ids could not lose the end of an answer either.

    Returns:
        A fast tokenizer with eos and pad set and no BOS; `len(tokenizer)` is 259.
    """
    backend = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_alphabet())}, merges=[]))
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
