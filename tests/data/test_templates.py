"""Templates: Alpaca's exact text, and the chat template against transformers' own masks."""

import pytest

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.data.templates import render, render_prompt, tokenize

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


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        (SINGLE, ALPACA, ["Red.<eos>"]),
        (WITH_INPUT, ALPACA_WITH_INPUT, ["Short.<eos>"]),
        (CHAT, ALPACA_CHAT, ["Un.<eos>", " Deux.\n<eos>"]),
    ],
)
def test_alpaca_text(byte_tokenizer, row, prompt, answers):
    text, spans = render(row, "alpaca", byte_tokenizer)
    assert text == prompt + answers[-1] and spans[-1] == (len(prompt), len(text))
    assert [text[start:end] for start, end in spans] == answers
    assert render_prompt(row, "alpaca", byte_tokenizer) == prompt
    assert render_prompt(Row(row.turns[:-1], row.input), "alpaca", byte_tokenizer) == prompt


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("begun", ["No. Still:", "<eos> \u00e9:"])
def test_what_is_begun_is_read_and_not_trained_on(make_tokenizer, template, begun):
    """The text is that of the whole answer; also where what is begun spells a control token."""
    tokenizer, (*before, (role, answer)) = make_tokenizer(), TURNS
    whole, spans = render(Row((*before, (role, begun + answer))), template, tokenizer)
    text, (first, last) = render(Row(TURNS, begun=begun), template, tokenizer)
    assert text == whole and first == spans[0]
    assert whole[slice(*spans[1])].endswith(text[slice(*last)]) and text[slice(*last)].startswith(answer.rstrip())
    assert text[: last[0]] == render_prompt(Row(TURNS, begun=begun), template, tokenizer)


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
    assert ids == oracle["input_ids"]
    mask = [int(any(end > a and start < b for a, b in spans)) for start, end in offsets]
    assert mask == oracle["assistant_masks"]

    prompt = render_prompt(row, "chat", tokenizer)
    assert text.startswith(prompt)
    oracle = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert tokenize(prompt, "chat", tokenizer)[0] == oracle["input_ids"]


@pytest.mark.parametrize(("template", "written"), [("alpaca", ""), ("chat", "{{ bos_token }}")])
def test_bos_is_there_once(make_tokenizer, template, written):
    """Whoever writes it: the tokenizer, or a chat template in its place."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = written + tokenizer.chat_template
    ids, _ = tokenize(render(SINGLE, template, tokenizer)[0], template, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_turn_may_end_with_another_special_token(make_tokenizer):
    """Gemma's turns end with <end_of_turn>, not with EOS."""
    tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    text, spans = render(SINGLE, "chat", tokenizer)
    assert [text[start:end] for start, end in spans] == ["Red.<end_of_turn>"]


BAD_TEMPLATES = {
    # As Qwen3's, which writes a reasoning block in the last turn and strips it from earlier ones.
    "rewrites earlier turns": (
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "rewrites earlier turns as a chat grows",
    ),
    "no end": ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "does not end the assistant's turn"),
    "refuses": (
        "{{ raise_exception('System role\n not supported') }}",
        r"f:1: the model's chat template refuses this row \(System role not supported\)",
    ),
    "none": (None, "the model has no chat template; use template 'alpaca'"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_chat_templates(make_tokenizer, name):
    template, message = BAD_TEMPLATES[name]
    row = Row(CHAT.turns, origin="f:1")
    with pytest.raises(UserError, match=message) as error:
        render(row, "chat", make_tokenizer(chat_template=template))
    assert "\n" not in str(error.value)


def test_bad_arguments(byte_tokenizer, make_tokenizer):
    (endless := make_tokenizer()).eos_token = None
    unanswered = Row((("user", "Hi"),), origin="f:3")
    for call, row, template, tokenizer, message in (
        (render, SINGLE, "alpacca", byte_tokenizer, "unknown template 'alpacca'; near: alpaca"),
        (render, unanswered, "alpaca", byte_tokenizer, "f:3: ends with 'user'"),
        (render, Row(()), "chat", byte_tokenizer, "a row: ends with nothing; end it with the"),
        (render_prompt, Row(()), "chat", byte_tokenizer, "a row: has no turn of the user's"),
        (render, SINGLE, "alpaca", endless, "no EOS token"),
    ):
        with pytest.raises(UserError, match=message):
            call(row, template, tokenizer)
