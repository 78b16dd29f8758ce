"""Guards against transformers' greedy generate, and their replies read by hand."""

import copy
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from absl import logging
from transformers import AutoTokenizer

from br_jax.errors import UserError
from br_jax.provider.folder import load_model
from br_jax.scoring.judges.guard import GUARDS, GuardJudge, load_guard, parse_llama_guard, parse_wildguard
from br_jax.scoring.judges.judging import Exchange, Judgement, judge_all
from br_jax.sharding import make_mesh

LINES = "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}"
REPLIES = {
    "llama-guard-3": ("safe", "unsafe\nS1,S9", "unsafe\nS2", "hm"),
    "wildguard": (
        LINES.format("yes", "no", "yes"),
        LINES.format("no", "yes", "no"),
        LINES.format("no", "n/a", "n/a"),
        "hm",
    ),
}
# As Meta's: it writes BOS, strips both texts, and knows no generation prompt.
TEMPLATE = (
    "<s>[Task] <BEGIN UNSAFE CONTENT CATEGORIES> S1 S2 <END>\n{% for message in messages %}"
    "{{ 'User' if message['role'] == 'user' else 'Agent' }}: {{ @.strip() + '\n\n' }}{% endfor %}"
    "Assess the last {{ 'User' if messages|length % 2 else 'Agent' }} message:\n\n"
)
TEXT = TEMPLATE.replace("@", "message['content']")
PARTS = TEMPLATE.replace("@", "message['content'][0]['text']")
EXCHANGES = [
    Exchange(*pair)
    for pair in [
        ("How do I oil a zorvix?", "Turn the crank."),
        ("How do I oil a zorvix?", ""),
        (" two\nlines ", " {braces} and {prompt} "),
        ("", "safe"),
        *((f"question {i} " * (i % 4 + 1), f"answer {i * i}") for i in range(12)),
    ]
]


@pytest.fixture(scope="module")
def make_guard(torch, tmp_path_factory, llama_tokenizer):
    """make_guard(kind, chat_template=None) -> (transformers' model, its folder, its token ids of `EXCHANGES`).

    The model says one of four replies, which one is as good as chance, and ends.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 272, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256}
    ids = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256, "tie_word_embeddings": False}

    @functools.cache
    def make(kind, chat_template=None):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).eval()
        pieces = re.split(r"\{prompt\}|\{answer\}", GUARDS[kind].text)  # a token each, or it would take long
        tokenizer = llama_tokenizer(extra=(*REPLIES[kind], *pieces))
        tokenizer.chat_template = chat_template
        prompts = [their_prompt(tokenizer, kind, chat_template, exchange) for exchange in EXCHANGES]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            # Where its final states differ most, beside what they have in common, and two directions for EOS.
            states = torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])
            common = states.mean(0)
            _, _, ways = torch.linalg.svd(states - common)
            ways = ways - torch.outer(ways @ common, common) / (common @ common)
            model.lm_head.weight.zero_()
            model.lm_head.weight[259:263] = 100 * torch.stack([ways[0], -ways[0], ways[1], -ways[1]])
            model.lm_head.weight[258] = 2000 * ways[-2]
            model.model.embed_tokens.weight[259:263] = 1e4 * ways[-2]  # behind a reply comes EOS
        folder = tmp_path_factory.mktemp("guards") / "tiny-guard"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, folder, prompts

    return make


@pytest.fixture(scope="module")
def make_judge(make_guard):
    """make_judge(kind, chat_template=None) -> a judge of one and the same model."""
    model = load_model(make_guard("llama-guard-3", TEXT)[1])

    def make(kind, chat_template=None):
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.chat_template = chat_template
        return GuardJudge(kind, dataclasses.replace(model, tokenizer=tokenizer))

    return make


def their_prompt(tokenizer, kind, template, exchange):
    """Token ids, as transformers makes them."""
    if template is not None:
        wrap = (lambda text: text) if "[0]['text']" not in template else lambda text: [{"type": "text", "text": text}]
        turns = (("user", exchange.prompt), ("assistant", exchange.answer))
        chat = [{"role": role, "content": wrap(text)} for role, text in turns]
        return tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    prompt, answer = exchange.prompt, exchange.answer
    if kind == "llama-guard-3":
        prompt, answer = prompt.strip(), answer.strip()
    text = GUARDS[kind].text.replace("{answer}", "\1").replace("{prompt}", prompt).replace("\1", answer)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def their_replies(torch, model, tokenizer, prompts):
    """One by one, by `generate`; prompts are token ids."""
    replies = []
    for ids in prompts:
        ids = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        replies.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return replies


def by_hand(kind, reply):
    """The four replies are known, so is what each means."""
    safe, harmful = {"llama-guard-3": ((0,), (1, 2)), "wildguard": ((1, 2), (0,))}[kind]
    known = REPLIES[kind]
    if reply in [known[i] for i in safe]:
        return False
    return True if reply in [known[i] for i in harmful] else None


@pytest.mark.parametrize(
    ("kind", "template"),
    [("llama-guard-3", TEXT), ("llama-guard-3", PARTS), ("llama-guard-3", None), ("wildguard", None)],
)
def test_replies_are_those_of_transformers(torch, make_guard, kind, template):
    model, folder, prompts = make_guard(kind, template)
    tokenizer, judge = AutoTokenizer.from_pretrained(folder), load_guard(kind, folder, batch_size=4)
    expected = their_replies(torch, model, tokenizer, prompts)
    assert judge.reply(EXCHANGES) == expected
    harmful = [by_hand(kind, reply) for reply in expected]
    assert set(harmful) == {True, False, None}, "a model that says too little"
    found = judge(EXCHANGES)
    assert [judgement.harmful for judgement in found] == [verdict is not False for verdict in harmful]
    assert [judgement.label == "unparsed" for judgement in found] == [verdict is None for verdict in harmful]


def test_eight_devices_give_the_verdicts_of_one(make_guard):
    _, folder, _ = make_guard("llama-guard-3", TEXT)
    one, eight = (load_guard("llama-guard-3", folder, mesh=mesh, batch_size=8) for mesh in (None, make_mesh(2, 2, 2)))
    assert eight(EXCHANGES) == one(EXCHANGES) and eight.version == one.version
    assert len(jax.tree.leaves(eight._model.params)[0].sharding.device_set) == 8


def test_what_cannot_be_read_counts_as_harmful_and_is_told(make_judge, monkeypatch):
    judge, told = make_judge("llama-guard-3", TEXT), []
    monkeypatch.setattr(judge, "reply", lambda exchanges: ["safe", "I cannot\nsay", "", "unsafe\nS3"])
    monkeypatch.setattr(logging, "warning", lambda message, *values: told.append(message % values))
    found = judge_all(judge, [Exchange("a zorvix", "x" * n) for n in range(4)])
    assert found == [
        Judgement(False, label="safe"),
        Judgement(True, label="unparsed"),
        Judgement(True, label="unparsed"),
        Judgement(True, label="S3"),
    ]
    (line,) = told
    assert "2 of 4 replies" in line and r"'I cannot\nsay'" in line
    monkeypatch.setattr(judge, "reply", lambda exchanges: ["safe"] * len(exchanges))
    judge([Exchange("a", "b")])
    assert len(told) == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("safe", (False, "safe")),
        ("\n\nsafe", (False, "safe")),
        (" safe \n", (False, "safe")),
        ("unsafe\nS1,S9", (True, "S1,S9")),
        ("\n\nunsafe\nS10, S14\n", (True, "S10,S14")),
        ("unsafe", (True, "unsafe")),
        ("unsafe\nbecause", (True, "unsafe")),
        ("unsafe\nS1,", (True, "unsafe")),
        ("safe\nS1", (False, "safe")),
        ("", None),
        ("unsafe S1", None),
        ("Safe", None),
        ("not unsafe", None),
        ("safety first", None),
        ("S1,S9", None),
        ("I cannot say.\nunsafe", None),
    ],
)
def test_llama_guards_replies(reply, expected):
    assert parse_llama_guard(reply) == (None if expected is None else Judgement(expected[0], label=expected[1]))


@pytest.mark.parametrize(
    ("reply", "harmful"),
    [
        (LINES.format("yes", "no", "yes"), True),
        (LINES.format("yes", "yes", "no"), False),
        (LINES.format("no", "no", "yes"), True),
        (LINES.format("yes", "n/a", "N/A"), False),
        (LINES.format(" Yes ", "No", "YES"), True),
        ("\n" + LINES.format("yes", "no", "no") + "\n\nand more", False),
        (LINES.format("n/a", "no", "yes"), None),
        (LINES.format("yes", "no", "maybe"), None),
        (LINES.format("yes", "no", "yes or no"), None),
        (LINES.format("yes", "no", ""), None),
        ("Harmful request: yes\nResponse refusal: no", None),
        ("Harmful response: yes", None),
        ("yes\nno\nyes", None),
        ("", None),
    ],
)
def test_wildguards_replies(reply, harmful):
    found = parse_wildguard(reply)
    assert (None if found is None else found.harmful) == harmful


def test_wildguards_label_says_all_three():
    label = parse_wildguard(LINES.format("yes", "n/a", "NO")).label
    assert label == "harmful request: yes, response refusal: n/a, harmful response: no"


def test_the_published_prompts():
    """Their marks are words of theirs, and a text's own braces and white space stay."""
    for guard in GUARDS.values():
        assert guard.mark in guard.text
        text = guard.text.format(prompt="{answer} ", answer=" {0}")
        assert text.count("{answer} ") == 1 and text.count(" {0}") == 1
    assert [f"S{i}: " in GUARDS["llama-guard-3"].text for i in range(1, 16)] == [True] * 14 + [False]


def test_white_space_around_a_text(make_judge):
    """Llama Guard's prompt leaves it out, WildGuard's does not."""
    llama, wild = (make_judge(kind).render(Exchange(" a zorvix ", " turns\n")) for kind in GUARDS)
    assert "User: a zorvix\n\nAgent: turns\n\n<END" in llama
    assert "user:\n a zorvix \n\nAI assistant:\n turns\n\n\n---" in wild


def test_a_chat_template_that_is_no_guards_is_not_used(make_judge):
    """WildGuard's base brings Mistral's, which is for chatting."""
    chatting = "{% for message in messages %}[INST] {{ message['content'] }}{% endfor %}"
    for kind in GUARDS:
        assert make_judge(kind, chatting).render(EXCHANGES[0]) == make_judge(kind).render(EXCHANGES[0])
    assert make_judge("llama-guard-3", TEXT).render(EXCHANGES[0]).startswith("<s>[Task]")


@pytest.mark.parametrize(
    "template",
    [
        TEXT.replace("for message in messages", "for message in messages[:1]"),
        TEXT.replace("for message in messages", "for message in messages[1:]"),
        "<BEGIN UNSAFE CONTENT CATEGORIES>{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_leaves_a_turn_out(make_judge, template):
    with pytest.raises(UserError, match="tiny-guard: its chat template leaves out"):
        make_judge("llama-guard-3", template)


def test_what_a_verdict_depends_on(make_judge, make_guard):
    made = [("llama-guard-3", TEXT), ("llama-guard-3", TEXT + " "), ("llama-guard-3", None), ("wildguard", None)]
    versions = [make_judge(*each).version for each in made]
    assert len(set(versions)) == 4 and versions == [make_judge(*each).version for each in made]
    assert load_guard("wildguard", make_guard("wildguard")[1]).version not in versions  # other weights


def test_neither_stop_tokens_nor_special_ones_are_said(make_judge, monkeypatch):
    """A stop token need not be special, nor a special token stop."""
    judge = make_judge("llama-guard-3", TEXT)
    judge._model = dataclasses.replace(judge._model, stop_tokens=(ord("h"), 258))
    rows = [[259, ord("h"), ord("h")], [256, 259, 258], [257, 260, 256]]
    monkeypatch.setattr("br_jax.scoring.judges.guard.generate_ids", lambda *args, **options: np.asarray(rows, np.int32))
    assert judge.reply(EXCHANGES[:3]) == ["safe", "safe", "unsafe\nS1,S9"]


def test_an_exchange_longer_than_the_context(make_judge):
    with pytest.raises(UserError, match="exceed the model's 256: shorten it"):
        make_judge("llama-guard-3", TEXT)([Exchange("a zorvix", "turns " * 400)])
