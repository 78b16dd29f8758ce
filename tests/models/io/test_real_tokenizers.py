"""Tokens and loss masks of rows against transformers', with tokenizers made and read as the families' own."""

import json
import re
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from br_jax.core.errors import UserError
from br_jax.data.batches import encode, encode_rows
from br_jax.data.rows import Row
from br_jax.data.templates import MARK, render
from br_jax.models.io.hf import read_tokenizer
from br_jax.models.spec import ModelSpec


def template(head, opening, content, end, after=""):
    """A maker's chat template, which marks the assistant's answers with the token that ends each."""
    prompt = opening.replace("message.role", "'assistant'")
    return (
        f"{head}{{% for message in messages %}}{opening}{{% if message.role == 'assistant' %}}"
        f"{{% generation %}}{{{{ {content} + '{end}' }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {content} + '{end}' }}}}{{% endif %}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA3 = template(
    "{{ bos_token }}",
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}",
    "(message.content | trim)",
    "<|eot_id|>",
)
QWEN2 = template(
    f"{{{{ '' if messages[0].role == 'system' else '<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n' }}}}",
    "{{ '<|im_start|>' + message.role + '\n' }}",
    "message.content",
    "<|im_end|>",
    "{{ '\n' }}",
)
GEMMA = template(
    "{{ bos_token }}",
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}",
    "(message.content | trim)",
    "<end_of_turn>",
    "{{ '\n' }}",
)


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


def llama3_tokenizer(rows, make):
    """BOS by the post-processor, and <|eot_id|> as EOS, as in its Instruct models."""
    model = trained(make({}, []), rows, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend, bos = make(model["vocab"], model["merges"]), "<|begin_of_text|>"
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    begins = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA3
    )


def qwen2_tokenizer(rows, _):
    model = trained(Qwen2Tokenizer().backend_tokenizer, rows, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(**model, eos_token="<|im_end|>", chat_template=QWEN2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def gemma_tokenizer(rows, _):
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


@pytest.fixture(scope="module", params=[llama3_tokenizer, qwen2_tokenizer, gemma_tokenizer])
def pair(request, rows, llama3_backend, tmp_path_factory):
    """(the tokenizer that we read from a folder, transformers' of the same folder) of each family."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(rows, llama3_backend).save_pretrained(folder)
    spec = ModelSpec(1000, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffw_dim=8)
    return read_tokenizer(folder, spec), AutoTokenizer.from_pretrained(folder)


def oracle(tokenizer, row, **cut):
    """Token ids and mask by transformers' generation marks."""
    messages = [{"role": role, "content": text} for role, text in row.turns]
    if row.input:
        messages[0]["content"] += "\n" + row.input
    marks = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenizer_kwargs": {}}
    encoded = tokenizer.apply_chat_template(messages, **marks | cut)
    return encoded["input_ids"], [bool(i) for i in encoded["assistant_masks"]]


def spells_control(tokenizer, row):
    """Whether transformers makes an added token, all of which are special here, of what a row says."""
    texts, added = [row.input, *(text for _, text in row.turns)], set(tokenizer.added_tokens_decoder)
    return any(added & set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_tokens_and_masks_are_those_of_transformers(pair, rows):
    ours, theirs = pair
    rows = [row for row in rows if not spells_control(theirs, row)]
    assert len(rows) > 70
    examples, dropped = encode_rows(rows, ours, "chat", 1 << 20)
    assert dropped.total == dropped.truncated == 0
    for row, example in zip(rows, examples, strict=True):
        ids, mask = oracle(theirs, row)
        assert example["tokens"].tolist() == ids, row
        assert example["answer"].tolist() == mask, row
        for length in (len(ids) // 4, len(ids) - 1):
            ids, mask = oracle(theirs, row, truncation=True, max_length=length)
            assert len(ids) == length
            if any(mask):
                ((cut,), _) = encode_rows([row], ours, "chat", length)
                assert (cut["tokens"].tolist(), cut["answer"].tolist()) == (ids, mask), row
            else:
                with pytest.raises(UserError, match="1 of 1 do not fit"):
                    encode_rows([row], ours, "chat", length)


def test_typed_control_tokens_are_what_transformers_makes_of_split_ones(pair, rows):
    """Between the template's tokens it is asked to take none."""
    ours, theirs = pair
    names = [token.content for token in theirs.added_tokens_decoder.values()]
    texts = [f"{a}{b[0]}{a}{b[1:]} {b}{b}" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    typed = [Row((("user", text), ("assistant", text[::-1] + text)), input=text) for text in texts]
    typed += [row for row in rows if spells_control(theirs, row)]
    for row in typed:
        text, spans = render(row, "chat", ours)
        assert MARK in text
        expected = []
        for part in re.split("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")", text):
            plain = part.replace(MARK, "")
            as_text = theirs(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            expected += [theirs.convert_tokens_to_ids(part)] if part in names else as_text
        example = encode(row, ours, "chat")
        assert example["tokens"].tolist() == expected, row
        said = "".join(text[start:end] for start, end in spans)
        for ids, meant in ((expected, text), (example["tokens"][example["answer"]], said)):
            # Gemma's space is written "▁", and newlines that an answer begins with are one token with the prompt's.
            assert ours.decode(ids).replace("▁", " ").strip() == meant.replace(MARK, "").replace("▁", " ").strip()
