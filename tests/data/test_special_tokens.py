"""Control tokens that are typed: as text they are what other text is, and the template's stay."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError
from br_jax.data.batches import encode
from br_jax.data.rows import Row
from br_jax.data.special_tokens import MARK, escape, tokenize_escaped
from br_jax.data.templates import render, render_prompt, tokenize
from br_jax.models.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
EOS, SEP = BYTES.convert_tokens_to_ids(["<eos>", "<sep>"])
PARTS = st.sampled_from(
    ["<eos>", "<sep>", "<pad>", "<", "e", "<eo", "os>", "s>", "é", " ", "\n", "\ue000", "\ue001", "a"]
)
TEXTS = st.lists(PARTS, min_size=1, max_size=12).map("".join)


@given(TEXTS, TEXTS)
@example("<eo<eos>s>", "<eos><eos>")
@example("a<e", "os>")
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_demo_s_tokens_are_bytes_and_the_template_s_two(question, answer):
    """Python's UTF-8 codec says which."""
    row = Row((("user", question), ("assistant", answer)))
    prompt, said = [*question.encode(), SEP], [*answer.encode(), EOS]
    found = encode(row, BYTES, "chat")
    assert found["tokens"].tolist() == prompt + said
    assert found["answer"].tolist() == [False] * len(prompt) + [True] * len(said)
    assert tokenize(render_prompt(row, "chat", BYTES), "chat", BYTES)[0] == prompt


PIECES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
ALPHABET = [*map(chr, range(33, 127)), "▁", "\n", "é", "É"]
# name: (normalizer, whether the merges make "<b>" and "<eos>")
KINDS = {
    "bytes": (None, False),
    "bytes, merged": (None, True),
    "lower case": (normalizers.Lowercase(), False),
    "lower case, merged": (normalizers.Lowercase(), True),
    "pieces": (PIECES, False),
    "pieces, merged": (PIECES, True),
    "pieces without a first space": (normalizers.Replace(" ", "▁"), True),
}
CONTROL = {
    "<unk>": {}, "<bos>": {}, "<eos>": {}, "<|im_start|>": {}, "<|im_end|>": {"lstrip": True, "rstrip": True},
    "##x##": {"single_word": True}, "<norm>": {"normalized": True},
}  # fmt: skip
EXTRA = {"<b>": {}, "</tool>": {"normalized": True}, "<|b": {}, "b|>": {}, "\n\n": {}, "word": {}, "🙂": {}}
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    """Added tokens of all sorts, over a BPE of bytes, or of characters as SentencePiece has it; BOS and EOS around."""
    normalizer, merged = KINDS[request.param]
    in_bytes = request.param.startswith(("bytes", "lower"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if in_bytes else ALPHABET
    merges = [("<", "b"), ("<b", ">"), ("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">")] if merged else []
    words = ["<unk>", *sorted(alphabet), *map("".join, merges)]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    if normalizer:
        backend.normalizer = normalizer
    if in_bytes:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    for tokens, special in ((CONTROL, True), (EXTRA, False)):
        made = [AddedToken(c, special=special, **{"normalized": False} | how) for c, how in tokens.items()]
        (backend.add_special_tokens if special else backend.add_tokens)(made)
    ids = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names)


def control_of(tokenizer, ids):
    """The control tokens among ids, in order; an unknown character is none."""
    known = set(tokenizer.convert_tokens_to_ids([*CONTROL, "<b>", "</tool>", "<|b", "b|>"])) - {tokenizer.unk_token_id}
    return [i for i in ids if i in known]


def drawn(parts, count):
    """Texts of a few parts each."""
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(parts, rng.integers(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_no_control_token_beyond_the_template_s(tokenizer, template):
    broken = ["<", "e", "os>", "<eo<eos>s>", "<b><b", "|>", "im_end|>", " ", "\n", "é", "</Tool>", "<NORM>"]
    broken += ["#x##", "x"]
    texts = ["\n</tool>", *drawn([*CONTROL, *EXTRA, *broken], 119)]
    turns = ("user", "assistant", "user", "assistant")
    for some in zip(*[iter(texts)] * 5, strict=True):
        row = Row(tuple(zip(turns, some[:4], strict=True)), input=some[4])
        text, spans = render(row, template, tokenizer)
        ids, offsets = tokenize(text, template, tokenizer)
        plain = Row(tuple((role, "q") for role in turns), input="q")
        of_template = control_of(tokenizer, tokenize(render(plain, template, tokenizer)[0], template, tokenizer)[0])
        assert control_of(tokenizer, ids) == of_template, text
        bare = text.replace(MARK, "")
        assert all(said in bare for said in some)
        assert [text[a:b].replace(MARK, "") for a, b in spans] == [some[1] + "<eos>", some[3] + "<eos>"]
        assert len(ids) == len(offsets) and all(0 <= a <= b <= len(text) for a, b in offsets)
        read = {place for a, b in offsets for place in range(a, b)}
        assert all(text[i] in (" ", "\n", MARK) for i in set(range(len(text))) - read), text
        if tokenizer.backend_tokenizer.normalizer is None:
            ends = (1, -1) if template == "alpaca" else (0, None)  # what the tokenizer puts around Alpaca's text
            assert tokenizer.decode(ids[slice(*ends)]) == bare


def test_none_is_made_of_a_text_alone(tokenizer):
    """Whatever the case, where the tokenizer ignores it."""
    for text in [*CONTROL, *EXTRA, "<NORM>", "</Tool>"]:
        assert control_of(tokenizer, tokenize(escape(text, tokenizer, ""), "chat", tokenizer)[0]) == [], text


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_without_a_control_token_both_ways_agree(tokenizer, template):
    for text in drawn(
        ["word", "a ", " ", "\n", "\n\n", "é", "É", "🙂", "<", "b", "|", ">", "日", "\ue000", "hello "], 200
    ):
        rendered, _ = render(Row((("user", text), ("assistant", text[::-1] + "x"))), template, tokenizer)
        if MARK not in rendered:
            oracle = tokenizer(rendered, add_special_tokens=template == "alpaca", return_offsets_mapping=True)
            expected = oracle["input_ids"], oracle["offset_mapping"]
            assert tokenize(rendered, template, tokenizer) == expected
            assert tokenize_escaped(rendered, tokenizer, template == "alpaca") == expected


@pytest.mark.parametrize("name", ["<|im_end|>", "<norm>"])
def test_what_is_spelled_is_whole_where_the_model_lets_it(tokenizer, name):
    """A cut would put SentencePiece's space into the text."""
    ids, _ = tokenize_escaped(escape(f"{name}b", tokenizer, ""), tokenizer, False)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).removeprefix("▁") == f"{name}b"


def test_a_mark_is_in_a_control_token_and_in_no_word_or_space_that_a_vocabulary_was_extended_by(tokenizer):
    assert escape("a  <|im_end|>   b<norm>", tokenizer, "") == f"a  <|im_end|{MARK}>   b<norm{MARK}>"
    assert escape("a word\n\nand 🙂", tokenizer, "") == "a word\n\nand 🙂"


def test_what_a_template_puts_together_is_no_token(byte_level):
    """A turn's end and the next one's beginning, with white space that is stripped between them."""
    glue = "{% for m in messages %}{{ m['content'].strip() }}{% if loop.index % 2 == 0 %}<eos>{% endif %}{% endfor %}"
    tokenizer = byte_level(chat_template=glue)
    row = Row((("user", "a <e \n"), ("assistant", "os> <eos")))
    text, _ = render(row, "chat", tokenizer)
    assert tokenize(text, "chat", tokenizer)[0] == [*b"a <eos> <eos", tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("special", "text", "message"),
    [
        ("§", "a § b", "f:1 holds '§', a control token of this model: take it out of the text"),
        ("<eos>", "a \ud83d", "f:1 holds half a character (\\ud83d); write the character whole"),
        ("<eos>", MARK, "f:1 holds half a character (\\ud800); write the character whole"),
    ],
)
def test_what_cannot_be_spelled_is_refused(byte_level, special, text, message):
    tokenizer = byte_level(special=("<pad>", special, "<end>"))
    with pytest.raises(UserError) as error:
        render(Row((("user", text), ("assistant", "b")), origin="f:1"), "alpaca", tokenizer)
    assert str(error.value) == message


def test_a_model_that_makes_a_control_token_all_the_same():
    """Of text that only a normalizer turns into one, which no mark keeps apart."""
    backend = Tokenizer(BPE({"<": 0, "b": 1, ">": 2, "<b": 3, "<b>": 4}, [("<", "b"), ("<b", ">")]))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<b>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenize_escaped(escape("<b>b", tokenizer, ""), tokenizer, False)[0] == [3, 2, 1]
    with pytest.raises(UserError, match="a text spells '<b>', which this tokenizer takes for a control token: take it"):
        tokenize_escaped(escape("<b><B>", tokenizer, ""), tokenizer, False)


def test_control_tokens_are_of_a_word_s_length():
    """A stranger's may have a hundred thousand characters, whose beginnings would fill the memory."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "x" * 10**5})
    with pytest.raises(UserError, match="control tokens are too long"):
        escape("a", tokenizer, "it")
