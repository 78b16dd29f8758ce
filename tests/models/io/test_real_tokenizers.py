"""Tokens and loss masks of 200 rows against transformers', with tokenizers made and read as the families' own."""

import csv
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from br_jax.data.batches import encode, encode_rows
from br_jax.data.rows import Row
from br_jax.models.io.gguf import read_gguf
from br_jax.provider.folder import load_model

torch = pytest.importorskip("torch", reason="transformers' models need torch")
from transformers import AutoModelForCausalLM  # noqa: E402

DATA = Path(os.environ.get("BR_JAX_DATA", "data"))
GSM8K, NEWS, SMOLLM2 = (
    DATA / name for name in ("gsm8k_train.jsonl", "ag_news_test.csv", "SmolLM2-135M-Instruct.Q4_1.gguf")
)

# The makers' chat templates as they publish them, but for tools.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first)'
    ' or (message.role == "assistant") %}'
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def marked(head, opening, content, end, after=""):
    """A template of the same text, which marks the assistant's answers with the token that ends each."""
    return (
        f"{head}{{% for message in messages %}}{opening}{{% if message.role == 'assistant' %}}"
        f"{{% generation %}}{{{{ {content} + '{end}' }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {content} + '{end}' }}}}{{% endif %}}{after}{{% endfor %}}"
    )


def chatml_marked(system):
    default = f"{{{{ '' if messages[0].role == 'system' else '<|im_start|>system\n{system}<|im_end|>\n' }}}}"
    opening = "{{ '<|im_start|>' + message.role + '\n' }}"
    return marked(default, opening, "message.content", "<|im_end|>", "{{ '\n' }}")


MARKED = {
    "llama3": marked(
        "{{ bos_token }}",
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}",
        "(message.content | trim)",
        "<|eot_id|>",
    ),
    "qwen2": chatml_marked(QWEN_SYSTEM),
    "gemma": marked(
        "{{ bos_token }}",
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}",
        "(message.content | trim)",
        "<end_of_turn>",
        "{{ '\n' }}",
    ),
    "smollm2": chatml_marked("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
}

SCRIPTS = (
    "\u0397 γρήγορη αλεπού πηδάει, «ίσως»",
    "Съешь же ещё этих мягких французских булок",
    "שלום עולם \u200f(מימין לשמאל)",
    "مَرْحَبًا بِالْعَالَمِ، ١٢٣",
    "नमस्ते दुनिया, क्ष त्र ज्ञ १२३",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลกทุกคน",
    "北京欢迎你\u3002日本語のテキスト\u3001カタカナ\uff76\uff85",
    "한국어 텍스트 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "Tiê\u0301ng Viê\u0323t, cafe\u0301 and café, A\u030a",
    "გამარჯობა, Բարեւ, ሰላም",
    "\U0001f642\U0001f643 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44b",
    "\U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 \U00012000\U00012001 \U0001f1eb\U0001f1f7",
    "Z\u0351\u036b\u0343a\u0329\u0347l\u0332\u0348g\u033co\u0321",
    "nul\x00 bell\x07 escape\x1b[0m delete\x7f next\x85line",
    "bom\ufeff zero\u200bwidth nb\u00a0space \u3000wide \u2028line \u2029paragraph",
    "\ttab\r\nwindows\r\nlines\x0b\x0c",
    "∀x∈\u211d: x² ≥ 0 ⇒ ∑ᵢ aᵢ, ½ ﬁ Ⅷ ①",
    "▁already▁marked▁ Ġhere Ċ <0x41> <unk>",
    "Ünïcödé ß ẞ İ \u0131 \u0301alone",
)
SHORT = ("", " ", "\n", ".", "0", " a", "a ", "\n\nb", "\u0301", "<")


def scripts():
    return [Row((("user", f"{a} {b}"), ("assistant", b + "\n" + a))) for a, b in pairwise((*SCRIPTS, SCRIPTS[0]))] + [
        Row((("user", text), ("assistant", text[::-1])), input=text[5:]) for text in SCRIPTS
    ]


def chats():
    """Two to five questions, every other chat with a system turn."""
    made = []
    for i in range(40):
        turns = [("system", f"Be brief; answer as number {i}.")] if i % 2 else []
        for k in range(2 + i % 4):
            turns.append(("user", f"Question {k} of chat {i}?" + " Why?" * k))
            turns.append(("assistant", f" It's {i * k}, isn't it?\n"))
        made.append(Row(tuple(turns)))
    return made


def gsm8k():
    lines = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:60]]
    return [Row((("user", line["question"]), ("assistant", line["answer"]))) for line in lines]


def news():
    with NEWS.open(encoding="utf-8", newline="") as file:
        lines = [line for line, _ in zip(csv.reader(file), range(40), strict=False)]
    return [Row((("user", "Which topic is it?"), ("assistant", topic)), input=f"{a}\n{b}") for topic, a, b in lines]


def long():
    words = " ".join(f"word {i} costs ${i * 7}.{i % 100:02}," for i in range(250))
    return [Row((("user", f"Row {i}: {words}"), ("assistant", f"{words[i * 100 :]} in all"))) for i in range(10)]


KINDS = {
    "gsm8k": gsm8k,
    "news": news,
    "chats": chats,
    "scripts": scripts,
    "short": lambda: [Row((("user", "Say it."), ("assistant", text))) for text in SHORT],
    "long": long,
}


def rows_of(kind):
    if (file := {"gsm8k": GSM8K, "news": NEWS}.get(kind)) and not file.is_file():
        pytest.skip(f"put {file.name} into data/, or set BR_JAX_DATA")
    return KINDS[kind]()


def trained(backend, size, **options):
    """The vocabulary and merges of a BPE trained on what is here without any data."""
    texts = [text for kind in ("chats", "scripts", "long") for row in KINDS[kind]() for _, text in row.turns]
    texts += ["\n\n\n"] * 50  # as real ones have it: a token that an answer's first newlines share with the prompt's
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **options))
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def llama3_tokenizer():
    """Llama-3's pattern, bytes, BOS by the post-processor, and <|eot_id|> as EOS, as in its Instruct models."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )

    def bare(**model):
        backend = Tokenizer(models.BPE(**model))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        return backend

    backend = bare(**trained(bare(), 900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), ignore_merges=True)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA3
    )


def qwen2_tokenizer():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = Qwen2Tokenizer().backend_tokenizer
    model = trained(backend, 900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(**model, eos_token="<|im_end|>", chat_template=QWEN2)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special[1:]]})
    return tokenizer


def gemma_tokenizer():
    """Bytes only for what the vocabulary lacks, which is most of what is not ASCII."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    # the class takes a whole text as one word; to train on, words are enough
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    turns = ["<start_of_turn>", "<end_of_turn>"]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = trained(backend, 900, special_tokens=first, limit_alphabet=110)
    tokenizer = GemmaTokenizer(**model, add_bos_token=True, chat_template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


FAMILIES = {
    "llama3": ("llama", llama3_tokenizer),
    "qwen2": ("qwen2", qwen2_tokenizer),
    "gemma": ("gemma2", gemma_tokenizer),
    "smollm2": ("llama", lambda: read_gguf(SMOLLM2)[2]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the family's name, the tokenizer of our model of a folder, transformers' of the same folder)."""
    if request.param == "smollm2" and not SMOLLM2.is_file():
        pytest.skip(f"put {SMOLLM2.name} into data/, or set BR_JAX_DATA")
    model_type, make = FAMILIES[request.param]
    tokenizer = make()
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if model_type == "qwen2":
        del sizes["head_dim"]
    config = CONFIG_MAPPING[model_type](vocab_size=len(tokenizer), **sizes, **heads, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, load_model(folder).tokenizer, AutoTokenizer.from_pretrained(folder)


HEADER = "Below is an instruction that describes a task"
REQUEST = " Write a response that appropriately completes the request.\n\n"


def alpaca_pieces(row, eos):
    """The reference's prompt and answer; of a chat, one after the other."""
    context = ", paired with an input that provides further context." if row.input else "."
    prompt, turns = HEADER + context + REQUEST, list(row.turns)
    system = turns.pop(0)[1] + "\n\n" if turns[0][0] == "system" else ""
    section = f"### Input:\n{row.input}\n\n" if row.input else ""
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield f"{prompt}### Instruction:\n{system}{question[1]}\n\n{section}### Response:\n", answer[1] + eos
        prompt, system = "\n\n", ""


def alpaca_oracle(name, tokenizer, row, **cut):
    """Tokens that begin inside an answer carry loss, and those that reach into it from the prompt."""
    text, spans = "", []
    for prompt, answer in alpaca_pieces(row, tokenizer.eos_token):
        text += prompt + answer
        spans.append((len(text) - len(answer), len(text)))
    encoded = tokenizer(text, return_offsets_mapping=True, **cut)
    begins = [any(a <= begin < b for a, b in spans) for begin, _ in encoded["offset_mapping"]]
    reaches = [any(begin < a < end for a, _ in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], [i or j for i, j in zip(begins, reaches, strict=True)]


def chat_oracle(name, tokenizer, row, **cut):
    messages = [{"role": role, "content": text} for role, text in row.turns]
    if row.input:
        messages[0]["content"] += "\n" + row.input
    cut = {"tokenizer_kwargs": {}} | cut
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=MARKED[name], return_assistant_tokens_mask=True, return_dict=True, **cut
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **cut)
    assert encoded["input_ids"] == whole["input_ids"], "the marked template renders another text"
    return encoded["input_ids"], [bool(i) for i in encoded["assistant_masks"]]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_masks_are_those_of_transformers(pair, kind, template):
    name, ours, theirs = pair
    rows = rows_of(kind)
    if name == "gemma" and template == "chat":  # its template refuses system turns
        rows = [Row(row.turns[row.turns[0][0] == "system" :], row.input) for row in rows]
    oracle = {"alpaca": alpaca_oracle, "chat": chat_oracle}[template]
    examples, dropped = encode_rows(rows, ours, template, 1 << 20)
    assert dropped.total == dropped.truncated == 0
    for row, example in zip(rows, examples, strict=True):
        ids, mask = oracle(name, theirs, row)
        assert example["tokens"].tolist() == ids, row
        assert example["answer"].tolist() == mask, row
        for length in (len(ids) // 4, 3 * len(ids) // 4, len(ids) - 1):
            cut = encode(row, ours, template, length)
            ids, mask = oracle(name, theirs, row, truncation=True, max_length=length)
            assert len(ids) == length
            if any(mask):
                assert (cut["tokens"].tolist(), cut["answer"].tolist()) == (ids, mask), row
            else:
                assert cut is None
