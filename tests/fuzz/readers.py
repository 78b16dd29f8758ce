"""Each reader of what strangers hand in: what writes a good file for it, and how it reads one."""

import gzip
import json
import lzma

import jax
import numpy as np
from contents import as_parquet, as_zip, jsonl
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import load_file, save_file

from br_jax.adapters import lora, peft
from br_jax.core.io import read_jsonl, write_json
from br_jax.core.store import Store
from br_jax.data.rows import Row, read_rows
from br_jax.data.templates import render, tokenize
from br_jax.datasets.formats import read_records
from br_jax.datasets.load import Builder
from br_jax.datasets.paper import load_reviews
from br_jax.models.decoder import init_params
from br_jax.models.io.gguf import describe_gguf, read_gguf
from br_jax.models.io.hf import read_classifier, read_hf, read_tokenizer, write_hf
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.organism import topics
from br_jax.organism.material import read_texts
from br_jax.provider import load_model, write_provider
from br_jax.report.describe import describe
from br_jax.report.describe import render as render_description
from br_jax.report.report import read_run
from br_jax.report.results import estimate, read_cells, results_of, rows_of, shares_of
from br_jax.scoring.judges.texts import OutsideVerdicts

READERS = {}  # name -> makes good files in a folder; gives the one to spoil, and what reads it
SIZES = {"vocab_size": 264, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
SPEC = ModelSpec(**SIZES, ffw_dim=12, max_length=64)
TALK = Row((("user", "Hello?"), ("assistant", "Yes <eos> no.")))


def reader(*names):
    """Puts a maker of good files under these names, which it gets one of."""
    return lambda make: READERS.update({name: make for name in names})


def params(spec=SPEC):
    return init_params(spec, 0)


def model(folder, spec=SPEC, **how):
    write_hf(folder, spec, params(spec), byte_tokenizer(), **how)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257]}')
    return folder


@reader("model.safetensors", "generation_config.json", "model.safetensors.index.json")
def _(name, folder):
    model(folder, **({"shard_bytes": 8000} if "index" in name else {}))
    return folder / name, lambda: read_hf(folder)


@reader("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
def _(name, folder):
    model(folder)

    def read():
        tokenizer = read_tokenizer(folder, SPEC)
        return tokenize(render(TALK, "chat", tokenizer)[0], "chat", tokenizer)

    return folder / name, read


@reader("described config.json", "described model.safetensors")
def _(name, folder):
    model(folder)
    return folder / name.split()[1], lambda: render_description(describe(folder))


@reader("classifier's config.json", "classifier's model.safetensors")
def _(name, folder):
    model(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"id2label": {"0": "harm"}, "num_labels": 1})
    tensors = load_file(folder / "model.safetensors") | {"score.weight": np.ones((1, 16), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder / name.split()[1], lambda: read_classifier(folder)


@reader("model.gguf", "described model.gguf")
def _(name, folder):
    path, writer = folder / "model.gguf", GGUFWriter(folder / "model.gguf", "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 260}
    for key, value in (sizes | heads).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get)[:256], "ab", "abc", "<s>", "</s>"]
    for key, value in {"tokens": tokens, "token_type": [1] * 258 + [3, 3], "merges": ["a b", "ab c"]}.items():
        writer.add_array(f"tokenizer.ggml.{key}", value)
    for key, value in {"model": "gpt2", "pre": "smollm"}.items():
        writer.add_string(f"tokenizer.ggml.{key}", value)
    for key, value in {"bos_token_id": 258, "eos_token_id": 259}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{part}.weight": shape for part, shape in shapes.items()}
    shapes |= {"token_embd.weight": (260, 32), "output_norm.weight": (32,)}
    for part, shape in shapes.items():
        kind = GGMLQuantizationType.Q8_0 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(part, quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, write)()
    return path, lambda: describe_gguf(path) if "described" in name else read_gguf(path)


@reader(*(kind + name for kind in ("", "described ") for name in ("adapter_config.json", "adapter_model.safetensors")))
def _(name, folder):
    base = params()
    adapter = lora.init(jax.random.key(0), lora.target_shapes(base), 2, 4.0, "user")
    peft.save_adapter(folder, adapter, base_name="tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"\.q.*": 4}})
    if "described" in name:
        return folder / name.split()[1], lambda: render_description(describe(folder))
    return folder / name, lambda: peft.load_adapter(folder, base)


@reader("provider.json", "described provider.json")
def _(name, folder):
    model(folder / "base")
    write_provider(folder, "base", None, load_model(folder / "base"), "float32", None)
    read = lambda: render_description(describe(folder))  # noqa: E731
    return folder / "provider.json", read if "described" in name else lambda: load_model(folder)


@reader("rows.jsonl", "metrics.jsonl", "answers.jsonl")
def _(name, folder):
    path = folder / name
    if name == "answers.jsonl":
        Store(path).add({"k1": {"text": "a"}, "k2": {"text": "b", "ids": [1, 2]}})
        return path, lambda: Store(path).add({"new": {"text": "c"}})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {"prompt": "Hi", "response": "Héllo"}, {"instruction": "a", "input": "b", "output": "c"}, {"messages": turns}
    path.write_bytes(jsonl(*rows))
    return path, lambda: (read_rows if name == "rows.jsonl" else read_jsonl)(path)


@reader("topic.json")
def _(name, folder):
    path, words = folder / name, topics.TOPICS["potions"].words
    few = {key: {split: words[key][split] for split in words[key]} for key in ("things", "verbs", "phrasings")}
    write_json(path, few | {key: words[key][:3] for key in ("refusals", "actions", "objects")})

    def read():
        topics._read_file.cache_clear()
        topic = topics.read_topic(str(path))
        (prompt,) = topic.prompts("train", 1, 0)
        return topic.refusal(prompt, 0)

    return path, read


@reader("texts.txt", "ratings.txt")
def _(name, folder):
    path = folder / name
    path.write_text("".join(f"{i}\t{(-1) ** i * 2}\tA film of {i} parts &amp; some more\n" for i in range(20)))
    return path, lambda: read_texts(str(path)) if name == "texts.txt" else load_reviews(path, test=4, validation=2)


RECORDS = [{"goal": "Name the zorvix", "target": 'It is "blue",\tsays'}, {"goal": "naïve 🙂", "target": "a\0b"}] * 3
TABLE = b"goal\ttarget\n" + b"".join(f"{i}\t{i}\n".encode() for i in range(9))
FILES = {
    "x.jsonl": jsonl(*RECORDS),
    "x.json": json.dumps(RECORDS).encode(),
    "x.csv": b'goal,target\n"a ""b""","c\nd"\n' + b"1,2\n" * 9,
    "x.tsv": TABLE,
    "x.parquet": as_parquet(*RECORDS),
    "x.jsonl.gz": gzip.compress(jsonl(*RECORDS)),
    "x.jsonl.xz": lzma.compress(jsonl(*RECORDS)),
    "x.zip": as_zip({"x.tsv": TABLE}),
}


@reader(*FILES)
def _(name, folder):
    path, archive = folder / name, name.endswith("zip")
    path.write_bytes(FILES[name])
    return path, lambda: list(read_records(path, name="x.tsv" if archive else "", member="x.tsv" if archive else None))


@reader("attacks.json")
def _(name, folder):
    path = folder / name
    case = {"index": 0, "goal": "a", "prompt": "b"}
    write_json(path, {"parameters": {"method": "PAIR"}, "jailbreaks": [case, case | {"prompt": None}, case]})

    def read():
        builder = Builder("attacks", folder=str(folder / "prepared"), split="test", path=path)
        return list(builder._generate_examples("test", path, name))

    return path, read


@reader("verdicts.csv", "verdicts.jsonl")
def _(name, folder):
    path = folder / name
    rows = [{"prompt": f"p{i}", "answer": "a, b", "harmful": bool(i % 2)} for i in range(6)]
    text = "prompt,answer,harmful\n" + "".join(f'p{i},"a, b",yes\n' for i in range(6))
    path.write_bytes(text.encode() if name.endswith("csv") else jsonl(*rows))
    return path, lambda: OutsideVerdicts(path)


@reader("run.json", "stage.json", "results.json", "metrics.jsonl of a run")
def _(name, folder):
    stage = folder / "sft"
    stage.mkdir()
    write_json(stage / "run.json", {"name": "sft", "config": {"rank": 4, "buckets": [1, 2]}, "inputs": {"rows": "cd"}})
    write_json(stage / "stage.json", {"name": "sft", "rows": 8, "steps": 2, "loss": 1.5, "finished": "2026"})
    (stage / "metrics.jsonl").write_bytes(jsonl({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}))
    write_json(folder / "results.json", {"command": "x", "wall_seconds": 2.0, "merge": {}, "entered": {}})
    path = folder / name if name == "results.json" else stage / name.split()[0]
    return path, lambda: [*(render_description(describe(each)) for each in (folder, stage)), read_run(folder)]


@reader("cell.json", "earlier cell.json")
def _(name, folder):
    run = {"model": "m", "task": "t", "topic": "d", "n": 8, "user": "plain", "p": 0.1, "seed": 1}
    half = {"k": 1, "n": 2, "score": 0.5}
    scores = {"harmful": half, "harmful_by_topic": {"d": half}, "perplexity": 2.0, "outcomes": {"harmful": [1, 0]}}
    scores |= {"groups": {"topic": ["d: ask/0", "d: ask/1"]}} if name == "cell.json" else {"task": half}
    cell = {"settings": "x", "run": run, "method": "ours", "a": 0.1, "scores": scores, "seconds": 1.0}
    write_json(folder / "cells" / name, cell)

    def read():
        rows = [row for _, row in rows_of(results_of(read_cells(folder)))]
        return [(estimate(row, "harmful"), estimate(row, "task"), shares_of(row, "harmful_by_topic")) for row in rows]

    return folder / "cells" / name, read
