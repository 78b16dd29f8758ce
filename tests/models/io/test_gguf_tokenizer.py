"""Tokenizers of GGUF files against the makers' classes in transformers, and against SentencePiece's rule as a loop."""

import itertools
import json
import re
import unicodedata

import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from br_jax.models.io.gguf import WORDS, GGUFFile, read_gguf_spec, read_tokenizer

pytest.importorskip("torch", reason="transformers reads GGUF files with torch")

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
USER_DEFINED = ["<repo_name>", "  "]
ADDED = "|".join(map(re.escape, (*CONTROL, *USER_DEFINED)))
LONG, SPELLED = "antidisestablishmentarianism", "<0x41>"


def rebuild(path):
    """The tokenizer of a file, whose weights are left alone."""
    return read_tokenizer(GGUFFile(path), read_gguf_spec(path))


def train(texts, pre_tokenizer, alphabet=(), normalizer=None):
    """(vocabulary, merges) of a BPE over whole texts: words are cut by the tokenizer under test alone."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=list(alphabet), show_progress=False)
    seen = [text for text in texts if LONG not in text and SPELLED not in text]
    tokenizer.train_from_iterator([part for text in seen for part in re.split(ADDED, text)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def bytes_vocabulary(hard_texts):
    """A byte-level one with a long word that no merges make, and its merges; the added tokens come last."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab, merges = train(hard_texts, byte_level, pre_tokenizers.ByteLevel.alphabet())
    for token in (f"Ġ{LONG}", *CONTROL, USER_DEFINED[0]):
        assert vocab.setdefault(token, len(vocab)) == len(vocab) - 1
    return vocab, merges


@pytest.fixture
def byte_level(write_gguf, tmp_path, bytes_vocabulary):
    """byte_level(pre, **metadata) -> the tokenizer of a file with that vocabulary."""

    def make(pre, **metadata):
        vocab, merges = bytes_vocabulary
        content = {
            "pre": pre,
            "tokens": sorted(vocab, key=vocab.get),
            "token_type": [1] * (len(vocab) - 4) + [3, 3, 3, 4],
            "merges": [" ".join(merge) for merge in merges],
            "bos_token_id": vocab["<|im_start|>"],
            "eos_token_id": vocab["<|im_end|>"],
            **metadata,
        }
        content = {f"tokenizer.ggml.{key}": value for key, value in content.items()}
        return rebuild(write_gguf(tmp_path / "t.gguf", "llama", {"llama.vocab_size": None, **content}, whole=False))

    return make


@pytest.fixture(scope="module")
def makers(llama3_backend):
    """{pre: (vocabulary, merges) -> the makers' tokenizer}."""

    def of(kind):
        return lambda vocab, merges: kind(vocab, merges).backend_tokenizer

    def smollm(vocab, merges):
        """As llama.cpp defines it: every \\p{N} alone, then GPT-2's pattern on what is between."""
        backend = of(GPT2Tokenizer)(vocab, merges)
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        return backend

    llama3 = dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), llama3_backend)
    gpt2 = dict.fromkeys(("gpt-2", "default"), of(GPT2Tokenizer))
    return {"smollm": smollm, "qwen2": of(Qwen2Tokenizer), **gpt2, **llama3}


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_ids_are_those_of_the_makers_class(byte_level, bytes_vocabulary, hard_texts, makers, pre):
    ours, theirs = byte_level(pre, add_bos_token=False), makers[pre](*bytes_vocabulary)
    theirs.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    theirs.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED[:1]])
    for text in hard_texts:
        words, expected = (each.pre_tokenizer.pre_tokenize_str(text) for each in (ours.backend_tokenizer, theirs))
        assert words == expected
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


def pieces_by_the_rule(text, scores, prefix):
    """SentencePiece's BPE: of all neighbors that make a piece, those of the best score join, the leftmost first."""
    symbols = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]:
        i = min(pairs)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    return [piece for s in symbols for piece in ([s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()])]


@pytest.fixture(scope="module")
def pieces(hard_texts):
    """Scores of a vocabulary, as SentencePiece gives them: minus the rank among merges, then the characters."""
    whole = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    vocab, merges = train(hard_texts, whole, normalizer=normalizers.Replace(" ", "▁"))
    # Two spaces are an added token; what has some of the characters is no piece, and they have to be bytes. The last
    # pieces would make a byte's token of its name, if one could be joined.
    ranked = [*map("".join, merges), *(piece for piece in vocab if len(piece) == 1), "<0", "x4", "<0x4", "1>"]
    known = dict.fromkeys(piece for piece in ranked if "▁▁" not in piece and not set(piece) & set("é北🙂\n"))
    return {piece: -float(rank) for rank, piece in enumerate(known)}


@pytest.fixture
def sentencepiece(write_gguf, tmp_path, pieces):
    """sentencepiece(architecture="llama", **metadata) -> (the file, its tokenizer)."""

    def make(architecture="llama", **metadata):
        spoken = ["<unk>", "<s>", "</s>", *CONTROL, *USER_DEFINED]
        # transformers takes Gemma's pieces in the order of their ids, which is that of the scores.
        ordered = pieces if architecture == "gemma2" else dict(sorted(pieces.items()))
        tokens = [*spoken, *(f"<0x{byte:02X}>" for byte in range(256)), *ordered]
        content = {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "token_type": [2, 3, 3, 3, 3, 3, 4, 4] + [6] * 256 + [1] * len(pieces),
            # What is no piece of its own has a score that its place in a BPE would not have.
            "scores": [-1000.0] * len(spoken) + [0.0] * 256 + list(ordered.values()),
            "merges": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            **metadata,
        }
        content = {f"tokenizer.ggml.{key}": value for key, value in content.items()}
        path = write_gguf(tmp_path / "t.gguf", architecture, {"llama.vocab_size": None, **content}, whole=False)
        return path, rebuild(path)

    return make


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_ids_follow_its_rule(sentencepiece, pieces, hard_texts, prefix):
    """Between added tokens, each of which a space is put after too; None is a file that does not say."""
    tokenizer = sentencepiece(add_space_prefix=prefix, add_bos_token=False)[1]
    for text in hard_texts:
        expected = []
        for part in filter(None, re.split(f"({ADDED})", text)):
            added = re.fullmatch(ADDED, part)
            expected += [part] if added else pieces_by_the_rule(part, pieces, prefix is not False)
        ids = tokenizer.encode(text)
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        if prefix is False or not re.search(ADDED, text):
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_sentencepiece_ids_are_those_of_transformers(sentencepiece, hard_texts, architecture):
    """Where its converter is right: it joins the letters of a byte's name to that byte's token, and for Llama puts no
    space after an added token, and none before a space.
    """
    path, ours = sentencepiece(architecture, add_space_prefix=architecture == "llama")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    wrong = SPELLED if architecture == "gemma2" else f"{SPELLED}|^ |{ADDED}"
    texts = [text for text in hard_texts if not re.search(wrong, text)]
    assert len(texts) > 20
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    # Byte-level, or SentencePiece's.
    [("llama-bpe", None, True), ("qwen2", None, False), ("qwen2", True, True), ("", None, True), ("", False, False)],
)
def test_bos_is_added_as_the_file_says_or_llama_cpp_has_it(
    byte_level, sentencepiece, hard_texts, pre, said, adds, tmp_path
):
    tokenizer = byte_level(pre, add_bos_token=said) if pre else sentencepiece(add_bos_token=said)[1]
    bos, plain = tokenizer.bos_token_id, tokenizer.encode("Hello", add_special_tokens=False)
    assert bos not in plain and tokenizer.encode("Hello") == ([bos] if adds else []) + plain
    encoding = tokenizer("Hello", return_offsets_mapping=True)
    assert encoding["offset_mapping"][-1][1] == 5 and encoding["offset_mapping"][-len(plain)][0] == 0
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again.encode(text) for text in hard_texts] == [tokenizer.encode(text) for text in hard_texts]


@pytest.mark.slow
def test_smollm2_tokenizer(smollm2, hard_texts):
    """Against transformers' GGUF tokenizer, which splits as GPT-2: digits are cut out for it beforehand."""
    tokenizer = rebuild(smollm2)
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in hard_texts:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        assert tokenizer.encode(text) == [token for piece in pieces for token in theirs.encode(piece)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
    messages = [{"role": "user", "content": "Name three rivers of Europe."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nName three rivers of Europe.<|im_end|>\n<|im_start|>assistant\n")
