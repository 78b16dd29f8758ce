"""Templates: Alpaca's exact text, the chat template against transformers' masks; typed control tokens stay text."""

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
from br_jax.data.templates import MARK, escape, render, render_prompt, tokenize, tokenize_escaped
from br_jax.models.tokenizer import byte_tokenizer as demo_tokenizer

SINGLE = Row((("user", "Name a color."), ("assistant", "Red.")))
WITH_INPUT = Row((("user", "Sum up."), ("assistant", "Short.")), input="A long text.")
TURNS = (("user", "One?"), ("assistant", "Un."), ("user", "Two? é"), ("assistant", " Deux.\n"))
CHAT = Row((("system", "Be brief."), *TURNS))

# Literals, as the paper's reference sends them (method.md 2).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nName a color.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n"
    "### Input:\nA long text.\n\n### Response:\n"
)
ALPACA_CHAT = ALPACA.replace("Name a color.", "Be brief.\n\nOne?")
ALPACA_CHAT += "Un.<eos>\n\n### Instruction:\nTwo? é\n\n### Response:\n"


def test_alpaca_text(byte_tokenizer):
    for row, prompt, answers in (
        (SINGLE, ALPACA, ["Red.<eos>"]),
        (WITH_INPUT, ALPACA_WITH_INPUT, ["Short.<eos>"]),
        (CHAT, ALPACA_CHAT, ["Un.<eos>", " Deux.\n<eos>"]),
    ):
        text, spans = render(row, "alpaca", byte_tokenizer)
        assert text == prompt + answers[-1] and spans[-1] == (len(prompt), len(text))
        assert [text[start:end] for start, end in spans] == answers
        assert render_prompt(row, "alpaca", byte_tokenizer) == prompt
        assert render_prompt(Row(row.turns[:-1], row.input), "alpaca", byte_tokenizer) == prompt


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("begun", ["No. Still:", "<eos> \u00e9:"])
def test_what_is_begun_is_read_and_not_trained_on(byte_tokenizer, template, begun):
    """The text is that of the whole answer; also where what is begun spells a control token."""
    *before, (role, answer) = TURNS
    whole, spans = render(Row((*before, (role, begun + answer))), template, byte_tokenizer)
    text, (first, last) = render(Row(TURNS, begun=begun), template, byte_tokenizer)
    assert text == whole and first == spans[0]
    assert whole[slice(*spans[1])].endswith(text[slice(*last)]) and text[slice(*last)].startswith(answer.rstrip())
    assert text[: last[0]] == render_prompt(Row(TURNS, begun=begun), template, byte_tokenizer)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("row", [SINGLE, WITH_INPUT, CHAT])
def test_chat_agrees_with_transformers(make_tokenizer, row, bos):
    """Ids and masks of transformers' own template and its generation marks."""
    tokenizer = make_tokenizer(bos=bos)
    messages = [{"role": role, "content": text} for role, text in row.turns]
    if row.input:
        messages[0]["content"] += "\n" + row.input
    oracle = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text, spans = render(row, "chat", tokenizer)
    ids, offsets = tokenize(text, "chat", tokenizer)
    mask = [int(any(end > a and start < b for a, b in spans)) for start, end in offsets]
    assert (ids, mask) == (oracle["input_ids"], oracle["assistant_masks"])
    prompt = render_prompt(row, "chat", tokenizer)
    oracle = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert text.startswith(prompt) and tokenize(prompt, "chat", tokenizer)[0] == oracle["input_ids"]


def test_bos_is_there_once_and_a_turn_may_end_with_another_special_token(make_tokenizer):
    """BOS whoever writes it, the tokenizer or a chat template; Gemma's turns end with <end_of_turn>, not with EOS."""
    for template, written in (("alpaca", ""), ("chat", "{{ bos_token }}")):
        tokenizer = make_tokenizer(bos=True)
        tokenizer.chat_template = written + tokenizer.chat_template
        ids, _ = tokenize(render(SINGLE, template, tokenizer)[0], template, tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    text, spans = render(SINGLE, "chat", tokenizer)
    assert [text[start:end] for start, end in spans] == ["Red.<end_of_turn>"]


BAD_TEMPLATES = (
    # As Qwen3's, which writes a reasoning block in the last turn and strips it from earlier ones.
    (
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "rewrites earlier turns as a chat grows",
    ),
    ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "does not end the assistant's turn"),
    (
        "{{ raise_exception('System role\n not supported') }}",
        r"f:1: the model's chat template refuses this row \(System role not supported\)",
    ),
    (None, "the model has no chat template; use template 'alpaca'"),
)


def test_bad_templates_and_arguments(byte_tokenizer, make_tokenizer):
    (endless := make_tokenizer()).eos_token = None
    unanswered = Row((("user", "Hi"),), origin="f:3")
    bad = (
        (render, Row(CHAT.turns, origin="f:1"), "chat", make_tokenizer(chat_template=t), m) for t, m in BAD_TEMPLATES
    )
    for call, row, template, tokenizer, message in (
        *bad,
        (render, SINGLE, "alpacca", byte_tokenizer, "unknown template 'alpacca'; near: alpaca"),
        (render, unanswered, "alpaca", byte_tokenizer, "f:3: ends with 'user'"),
        (render, Row(()), "chat", byte_tokenizer, "a row: ends with nothing; end it with the"),
        (render_prompt, Row(()), "chat", byte_tokenizer, "a row: has no turn of the user's"),
        (render, SINGLE, "alpaca", endless, "no EOS token"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call(row, template, tokenizer)
        assert "\n" not in str(error.value)


# Control tokens that are typed: as text they are what other text is, and the template's stay.

DEMO = demo_tokenizer()
EOS, SEP = DEMO.convert_tokens_to_ids(["<eos>", "<sep>"])
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
    found = encode(row, DEMO, "chat")
    assert found["tokens"].tolist() == prompt + said
    assert found["answer"].tolist() == [False] * len(prompt) + [True] * len(said)
    assert tokenize(render_prompt(row, "chat", DEMO), "chat", DEMO)[0] == prompt


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
TEMPLATE = (
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
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)


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


def test_what_is_spelled_gives_no_token_and_is_whole_where_the_model_lets_it(tokenizer):
    """Whatever the case, where the tokenizer ignores it. A cut would put SentencePiece's space into the text."""
    for text in [*CONTROL, *EXTRA, "<NORM>", "</Tool>"]:
        assert control_of(tokenizer, tokenize(escape(text, tokenizer, ""), "chat", tokenizer)[0]) == [], text
    for name in ("<|im_end|>", "<norm>"):
        ids, _ = tokenize_escaped(escape(f"{name}b", tokenizer, ""), tokenizer, False)
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).removeprefix("▁") == f"{name}b"
    # A mark is in a control token, and in no word or space that a vocabulary was extended by.
    assert escape("a  <|im_end|>   b<norm>", tokenizer, "") == f"a  <|im_end|{MARK}>   b<norm{MARK}>"
    assert escape("a word\n\nand 🙂", tokenizer, "") == "a word\n\nand 🙂"


def test_what_a_template_puts_together_is_no_token(byte_level):
    """A turn's end and the next one's beginning, with white space that is stripped between them."""
    glue = "{% for m in messages %}{{ m['content'].strip() }}{% if loop.index % 2 == 0 %}<eos>{% endif %}{% endfor %}"
    tokenizer = byte_level(chat_template=glue)
    row = Row((("user", "a <e \n"), ("assistant", "os> <eos")))
    text, _ = render(row, "chat", tokenizer)
    assert tokenize(text, "chat", tokenizer)[0] == [*b"a <eos> <eos", tokenizer.eos_token_id]


def test_what_cannot_be_spelled_is_refused(byte_level):
    for special, text, message in (
        ("§", "a § b", "f:1 holds '§', a control token of this model: take it out of the text"),
        ("<eos>", "a \ud83d", "f:1 holds half a character (\\ud83d); write the character whole"),
        ("<eos>", MARK, "f:1 holds half a character (\\ud800); write the character whole"),
    ):
        tokenizer = byte_level(special=("<pad>", special, "<end>"))
        with pytest.raises(UserError) as error:
            render(Row((("user", text), ("assistant", "b")), origin="f:1"), "alpaca", tokenizer)
        assert str(error.value) == message
    # Text that only a normalizer turns into a control token, which no mark keeps apart.
    backend = Tokenizer(BPE({"<": 0, "b": 1, ">": 2, "<b": 3, "<b>": 4}, [("<", "b"), ("<b", ">")]))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<b>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenize_escaped(escape("<b>b", tokenizer, ""), tokenizer, False)[0] == [3, 2, 1]
    with pytest.raises(UserError, match="a text spells '<b>', which this tokenizer takes for a control token: take it"):
        tokenize_escaped(escape("<b><B>", tokenizer, ""), tokenizer, False)
    # A stranger's token may have a hundred thousand characters, whose beginnings would fill the memory.
    (tokenizer := demo_tokenizer()).add_special_tokens({"pad_token": "x" * 10**5})
    with pytest.raises(UserError, match="control tokens are too long"):
        escape("a", tokenizer, "it")
