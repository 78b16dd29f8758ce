"""Tokens and loss masks of rows against transformers', with tokenizers made and read as the families' own."""

import json
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from br_jax.data.batches import encode, encode_rows
from br_jax.data.rows import Row
from br_jax.models.io.hf import read_tokenizer
from br_jax.models.spec import ModelSpec

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


MARKED = {
    "llama3": marked(
        "{{ bos_token }}",
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}",
        "(message.content | trim)",
        "<|eot_id|>",
    ),
    "qwen2": marked(
        f"{{{{ '' if messages[0].role == 'system' else '<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n' }}}}",
        "{{ '<|im_start|>' + message.role + '\n' }}",
        "message.content",
        "<|im_end|>",
        "{{ '\n' }}",
    ),
    "gemma": marked(
        "{{ bos_token }}",
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}",
        "(message.content | trim)",
        "<end_of_turn>",
        "{{ '\n' }}",
    ),
}


def chats():
    """Two to five questions, every other chat with a system turn."""
    for i in range(12):
        turns = [("system", f"Be brief; answer as number {i}.")] if i % 2 else []
        for k in range(2 + i % 4):
            turns.append(("user", f"Question {k} of chat {i}?" + " Why?" * k))
            turns.append(("assistant", f" It's {i * k}, isn't it?\n"))
        yield Row(tuple(turns))


@pytest.fixture(scope="module")
def rows(hard_texts):
    """Chats; each text answering another, and itself with an input; the shortest answers; long rows."""
    texts = [*hard_texts, "▁already▁marked▁ <0x41> <unk>"]
    short = ("", " ", "\n", ".", "0", " a", "a ", "\n\nb", "\u0301", "<")
    words = " ".join(f"word {i} costs ${i * 7}.{i % 100:02}," for i in range(250))
    return [
        *chats(),
        *(Row((("user", f"{a} {b}"), ("assistant", b + "\n" + a))) for a, b in pairwise(texts)),
        *(Row((("user", text), ("assistant", text[::-1])), input=text[5:]) for text in texts),
        *(Row((("user", "Say it."), ("assistant", text))) for text in short),
        *(Row((("user", f"Row {i}: {words}"), ("assistant", f"{words[i * 2000 :]} in all"))) for i in range(3)),
    ]


def trained(backend, rows, **options):
    """The vocabulary and merges of a BPE trained on the rows."""
    texts = [text for row in rows for _, text in row.turns]
    texts += ["\n\n\n"] * 50  # as real ones have it: a token that an answer's first newlines share with the prompt's
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False, **options))
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def llama3_tokenizer(rows):
    """Llama-3's pattern, bytes, BOS by the post-processor, and <|eot_id|> as EOS, as in its Instruct models."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )

    def bare(**model):
        backend = Tokenizer(models.BPE(**model))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
        backend.decoder = decoders.ByteLevel()
        return backend

    model = trained(bare(), rows, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend, bos = bare(**model, ignore_merges=True), "<|begin_of_text|>"
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    begins = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA3
    )


def qwen2_tokenizer(rows):
    model = trained(Qwen2Tokenizer().backend_tokenizer, rows, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(**model, eos_token="<|im_end|>", chat_template=QWEN2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def gemma_tokenizer(rows):
    """Bytes only for what the vocabulary lacks, which is most of what is not ASCII."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    # the class takes a whole text as one word; to train on, words are enough
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    turns = ["<start_of_turn>", "<end_of_turn>"]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = trained(backend, rows, special_tokens=first, limit_alphabet=110)
    tokenizer = GemmaTokenizer(**model, add_bos_token=True, chat_template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


FAMILIES = {"llama3": llama3_tokenizer, "qwen2": qwen2_tokenizer, "gemma": gemma_tokenizer}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, rows, tmp_path_factory):
    """(the family's name, the tokenizer that we read from a folder, transformers' of the same folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](rows).save_pretrained(folder)
    spec = ModelSpec(1000, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffw_dim=8)
    return request.param, read_tokenizer(folder, spec), AutoTokenizer.from_pretrained(folder)


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
def test_tokens_and_masks_are_those_of_transformers(pair, rows, template):
    name, ours, theirs = pair
    if name == "gemma" and template == "chat":  # its template refuses system turns
        rows = [Row(row.turns[row.turns[0][0] == "system" :], row.input) for row in rows]
    oracle = {"alpaca": alpaca_oracle, "chat": chat_oracle}[template]
    examples, dropped = encode_rows(rows, ours, template, 1 << 20)
    assert dropped.total == dropped.truncated == 0
    for row, example in zip(rows, examples, strict=True):
        ids, mask = oracle(name, theirs, row)
        assert example["tokens"].tolist() == ids, row
        assert example["answer"].tolist() == mask, row
        for length in (len(ids) // 4, len(ids) - 1):
            cut = encode(row, ours, template, length)
            ids, mask = oracle(name, theirs, row, truncation=True, max_length=length)
            assert len(ids) == length
            if any(mask):
                assert (cut["tokens"].tolist(), cut["answer"].tolist()) == (ids, mask), row
            else:
                assert cut is None
