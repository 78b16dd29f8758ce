"""The tokenizer in a GGUF file's metadata, rebuilt: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama").

The metadata names the rules that cut a text into words; the rules themselves are the makers' own, from their
tokenizer.json. transformers has converters too, but none that one may rely on: 5.2 makes a Unigram model of Gemma's
tokenizer, 5.24 ignores `add_space_prefix` and loses a space that a text begins with, both forget SmolLM's digits.
"""

from typing import TYPE_CHECKING, NamedTuple

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError, one_line
from br_jax.models.spec import ModelSpec

if TYPE_CHECKING:
    from br_jax.models.io.gguf import GGUFFile

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPACE = "▁"  # SentencePiece's


class Words(NamedTuple):
    """How a text is cut into words before a byte-level BPE, and what else goes with that."""

    pattern: str | None = None  # a word's, or None for GPT-2's
    digits: bool = False  # each digit is a word of its own, whatever the pattern says
    composed: bool = False  # the text is brought to Unicode's composed form first (NFC)
    whole: bool = False  # a word that is a token is that token, whatever the merges say
    bos: bool = False  # a text begins with BOS where the file does not say (llama.cpp's src/llama-vocab.cpp has it so)


WORDS = {
    "smollm": Words(digits=True),
    "qwen2": Words(_QWEN2, composed=True),
    **dict.fromkeys(("gpt-2", "default"), Words()),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Words(_LLAMA3, whole=True, bos=True)),
}


def read_tokenizer(file: "GGUFFile", spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer that the metadata describes, for a model with that vocabulary and context.

    Raises:
        UserError: a tokenizer that br_jax does not have, or lists that do not go together.
    """
    rebuild = _MODELS[file.demand("tokenizer.ggml.model", _MODELS)]
    file.demand("tokenizer.ggml.add_eos_token", (False,), False)
    tokens = file.items("tokenizer.ggml.tokens", str)
    types = file.items("tokenizer.ggml.token_type", int, [TokenType.NORMAL] * len(tokens))
    distinct = len(set(tokens))
    if not distinct == len(tokens) == len(types) or len(tokens) > spec.vocab_size:
        raise UserError(
            f"{file.path}: {len(tokens)} tokens, {distinct} of them different, {len(types)} token types "
            f"and {spec.vocab_size} embeddings do not go together"
        )
    kinds = dict(zip(tokens, types, strict=True))
    backend, bos = rebuild(file, kinds)
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [AddedToken(token, special=special, normalized=False) for token in kinds if kinds[token] == kind]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    add_bos = bool(file.get("tokenizer.ggml.add_bos_token", bos))
    for name in ("eos", "bos") if add_bos else ("eos",):
        file.need(f"tokenizer.ggml.{name}_token_id")
    ids = {name: file.token(theirs, len(kinds)) for name, theirs in _NAMED.items()}
    if ids["pad_token"] is None:
        ids["pad_token"] = ids["eos_token"]  # masks never look at ids
    template = file.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{file.path}: tokenizer.chat_template is no text: convert it again")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=add_bos,
        chat_template=template,
        model_max_length=spec.max_length,
        clean_up_tokenization_spaces=False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )


# The ends of a turn and of a message, and their texts where a file does not say, as Gemma-2's does not; as llama.cpp's
# llama-vocab.cpp looks for them.
_ENDS = {"eot": ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"), "eom": ("<|eom_id|>",)}


def stop_tokens(file: "GGUFFile", spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids of `_ENDS`: what chat models say where plain ones say EOS."""
    vocab = tokenizer.get_vocab()
    said = {name: file.token(name, spec.vocab_size) for name in _ENDS}
    known = {name: next((vocab[text] for text in texts if text in vocab), None) for name, texts in _ENDS.items()}
    ids = [known[name] if said[name] is None else said[name] for name in _ENDS]
    return tuple(index for index in ids if index is not None)


def _byte_level(file: "GGUFFile", kinds: dict[str, int]) -> tuple[Tokenizer, bool]:
    """(A BPE over the bytes of a text's words, whether it adds BOS if the file does not say)."""
    words = WORDS[file.demand("tokenizer.ggml.pre", WORDS)]
    merges = [tuple(merge.split(" ")) for merge in file.items("tokenizer.ggml.merges", str)]
    backend = Tokenizer(_bpe(file, kinds, merges, ignore_merges=words.whole))
    if words.composed:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    steps += [pre_tokenizers.Split(Regex(words.pattern), "isolated")] if words.pattern else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, words.bos


def _sentencepiece(file: "GGUFFile", kinds: dict[str, int]) -> tuple[Tokenizer, bool]:
    """(A BPE over the characters of a whole text, whether it adds BOS if the file does not say).

    SentencePiece joins the two neighbors that make the piece of the highest score: merges are in the order of their
    results' scores. A character that is no piece is its bytes. Spaces are "▁"; one is put before the text, and before
    what follows an added token (as llama.cpp and the makers' tokenizer.json have it).
    """
    scores = file.items("tokenizer.ggml.scores", float)
    if len(scores) != len(kinds):
        raise UserError(f"{file.path}: {len(kinds)} tokens and {len(scores)} tokenizer.ggml.scores")
    for byte in range(256):
        if f"<0x{byte:02X}>" not in kinds and not (byte < 128 and chr(byte) in kinds):
            raise UserError(f"{file.path}: tokenizer.ggml.tokens has no <0x{byte:02X}>: a text could not be read")
    pieces = {
        token: score for (token, kind), score in zip(kinds.items(), scores, strict=True) if kind == TokenType.NORMAL
    }
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(pieces, key=pieces.get, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    backend = Tokenizer(_bpe(file, kinds, merges, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", left=1)] if prefix else []))
    return backend, True


_NAMED = {"eos_token": "eos", "bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}
_MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _bpe(file: "GGUFFile", kinds: dict[str, int], merges: list[tuple[str, ...]], **how) -> BPE:
    try:
        return BPE(vocab={token: i for i, token in enumerate(kinds)}, merges=merges, **how)
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens: {one_line(error)}") from error
