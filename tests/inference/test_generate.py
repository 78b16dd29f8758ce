"""Generation against a plain loop over whole forward passes, and answers through a store."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from br_jax.adapters import lora
from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh, shard
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.inference import generate as module
from br_jax.inference.generate import answer, decode_answer, encode_prompt, generate, generate_batches
from br_jax.models.decoder import Decoder, unembed

NEW = 6
PROMPTS = ["a", "what is it?", "", "say it again, and again", "count to 3", "ünï"]
HEADER = "the same header for all: "  # longer than a bucket, so that it is run once


@pytest.fixture(scope="module")
def speaker(make_tiny):
    """A model with a head of its own that speaks printable ASCII, and now and then ends its answer."""
    model = make_tiny(tie_embeddings=False)
    spoken = np.zeros(model.spec.vocab_size, np.float32)
    spoken[32:127], spoken[model.tokenizer.eos_token_id] = 25, 40
    model.params["head"]["kernel"] *= spoken[None]
    return model


@pytest.fixture(scope="module")
def plain(speaker):
    """plain(prompt, adapter=None) -> the greedy answer, one forward pass over everything a token."""
    length = 64

    @jax.jit
    def next_token(variables, tokens, n):
        places = jnp.arange(length)[None]
        hidden, _ = Decoder(speaker.spec).apply(variables, tokens, places, (places < n).astype(jnp.int32))
        return jnp.argmax(unembed(speaker.spec, speaker.params, hidden[0, n - 1]))

    def answer(prompt, adapter=None):
        variables = {"params": speaker.params} | ({"lora": lora.collection(adapter)} if adapter else {})
        ids = [*prompt.encode(), speaker.tokenizer.convert_tokens_to_ids("<sep>")]
        new = []
        while len(new) < NEW:
            tokens = np.zeros((1, length), np.int32)
            tokens[0, : len(ids) + len(new)] = ids + new
            new.append(int(next_token(variables, tokens, len(ids) + len(new))))
            if new[-1] == speaker.tokenizer.eos_token_id:
                new.pop()
                break
        return speaker.tokenizer.decode(new, skip_special_tokens=True)

    return answer


def greedy(model, prompts, adapter=None, **options):
    return generate(model, prompts, adapter, **{"max_new_tokens": NEW, "batch_size": 4, **options})


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_is_the_plain_loop_for_unequal_prompts(speaker, plain, make_adapter, with_adapter):
    adapter = make_adapter("user") if with_adapter else None
    found = greedy(speaker, PROMPTS, adapter)
    assert found == [plain(prompt, adapter) for prompt in PROMPTS] == greedy(speaker, PROMPTS[::-1], adapter)[::-1]
    assert found[:2] == [greedy(speaker, [prompt], adapter, batch_size=1)[0] for prompt in PROMPTS[:2]]
    assert len(set(found)) > 3, "the model says the same to everything"


def batches(model, prompts, adapters, **options):
    """{(adapter, prompt): answer} of all batches, and how many there were."""
    encoded = [encode_prompt(model, prompt) for prompt in prompts]
    settings = {"stops": model.stop_tokens, "max_new_tokens": NEW, "batch_size": 4, **options}
    found = list(generate_batches(model, encoded, adapters, **settings))
    return {pair: decode_answer(model, row) for batch in found for pair, row in batch.items()}, len(found)


def test_several_adapters_in_one_pass_answer_as_each_does_alone_also_on_a_mesh(speaker, make_adapter, monkeypatch):
    """Where a cache lies in parts from the first: made whole it would be laid out by a program of its own."""
    adapters = [make_adapter("user"), make_adapter("user", seed=5, rank=5), make_adapter("user", seed=6)]
    prompts = [HEADER + prompt for prompt in PROMPTS]
    found, _ = batches(speaker, prompts, adapters, batch_size=6)
    alone = [greedy(speaker, prompts, adapter) for adapter in adapters]
    assert found == {(a, i): alone[a][i] for a in range(3) for i in range(len(prompts))}
    assert len({tuple(answers) for answers in alone}) == 3
    with pytest.raises(ValueError, match="same targets"):
        batches(speaker, prompts, [adapters[0], None])
    made, empty = [], module._empty

    def watched(*args, **sizes):
        state = empty(*args, **sizes)
        made.extend(leaf.sharding for leaf in jax.tree.leaves(state["cache"]))
        return state

    monkeypatch.setattr(module, "_empty", watched)
    spread = dataclasses.replace(speaker, params=shard(speaker.params, make_mesh(2, 2, 2)))
    few = prompts[:2]  # of one bucket
    on_mesh, _ = batches(spread, few, adapters[:2], batch_size=32)
    assert on_mesh == {(a, i): alone[a][i] for a in range(2) for i in range(2)}
    assert {len(sharding.device_set) for sharding in made} == {8}
    assert greedy(spread, few, batch_size=8) == greedy(speaker, few)


def test_what_is_known_is_not_generated_and_changes_nothing_else(speaker, make_adapter, monkeypatch):
    queues, run = [], module._empty
    monkeypatch.setattr(module, "_ROUNDS", 1)
    monkeypatch.setattr(module, "_STREAMS", 1)
    monkeypatch.setattr(module, "_empty", lambda *args, **options: queues.append(1) or run(*args, **options))
    for adapters in ([None], [make_adapter("user"), make_adapter("user", seed=5)]):
        everything, _ = batches(speaker, PROMPTS, adapters)
        known = {(0, 2), (len(adapters) - 1, 5)}
        rest, _ = batches(speaker, PROMPTS, adapters, known=known)
        assert rest == {pair: text for pair, text in everything.items() if pair not in known}
        before = len(queues)
        batches(speaker, PROMPTS, adapters, known=set(list(everything)[:4]))
        assert len(queues) - before == len(adapters), "the first queue is not run again"
        assert batches(speaker, PROMPTS, adapters, known=set(everything)) == ({}, 0)


def test_a_row_that_ends_makes_room_for_the_next_prompt(speaker, plain, monkeypatch):
    """Answers of unequal length: prompts begin while others are still being answered, and all get their own answer."""
    prompts = [f"{word} {i}" for i in range(8) for word in ("a", "what is it?", "count")]
    expected = [plain(prompt) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2, "choose other prompts"
    going_on, run = [], module._advance

    def watched(*args, **options):
        state = run(*args, **options)
        going_on.append(int((~state["ended"]).sum()))
        return state

    monkeypatch.setattr(module, "_advance", watched)
    assert greedy(speaker, prompts, batch_size=8) == expected
    assert max(going_on) > 0 and going_on[-1] == 0


def test_a_shared_beginning_changes_nothing_and_a_short_one_is_not_worth_a_program(speaker, plain, compiles):
    prompts = ["this " + HEADER + prompt for prompt in PROMPTS]
    assert greedy(speaker, prompts) == [plain(prompt) for prompt in prompts]
    assert compiles.count("jit(_run_prefix)") == 1
    short = ["Mood: " + prompt for prompt in PROMPTS]
    assert greedy(speaker, short) == [plain(prompt) for prompt in short]
    assert compiles.count("jit(_run_prefix)") == 1


def test_it_stops_at_eos(speaker, monkeypatch):
    """The answer's third byte and EOS change places in the head: what was said before it stays, and there it ends."""
    text = greedy(speaker, ["a"])[0]
    byte, eos = ord(text[2]), speaker.tokenizer.eos_token_id
    assert text[2] not in text[:2], "choose another prompt"
    head = np.array(speaker.params["head"]["kernel"])
    head[:, [byte, eos]] = head[:, [eos, byte]]
    model = dataclasses.replace(speaker, params={**speaker.params, "head": {"kernel": jnp.asarray(head)}})
    # So does a chat model whose turns end in a token that is not EOS. Behind a row's stop token is EOS, among neighbors
    # that go on.
    chatty = dataclasses.replace(speaker, stop_tokens=(*speaker.stop_tokens, byte))
    for stopping, last in ((model, eos), (chatty, byte)):
        assert greedy(stopping, ["a"]) == [text[:2]]
        with monkeypatch.context() as patched:
            ids = []
            patched.setattr(module, "decode_answer", lambda model, row, ids=ids: ids.append(row.tolist()) or "")
            greedy(stopping, [*PROMPTS, "b", "c"], batch_size=8)
        assert [*map(ord, text[:2]), last, *[eos] * (NEW - 3)] in ids and any(row[-1] != eos for row in ids)


def test_sampling_repeats_with_the_seed_whatever_the_batch(speaker):
    def sample(prompts=PROMPTS, **options):
        return greedy(speaker, prompts, **{"temperature": 1.5, "seed": 3, **options})

    first, likeliest = sample(), greedy(speaker, PROMPTS)
    assert sample() == sample(batch_size=3) == first
    assert first not in (sample(seed=4), likeliest) and sample(temperature=1e-5) == likeliest
    assert len(set(sample(["a"] * 8))) > 4, "one prompt asked eight times gets one sample"
    wild, _ = batches(speaker, PROMPTS, [None], temperature=1e6)
    assert all(len(set(text)) > 2 for text in wild.values()), "every token of an answer is drawn alike"


def test_samples_follow_the_softmax(speaker):
    """The first token of 512 samples: each of the likeliest tokens within 4.5 standard deviations of its share."""
    n = 512
    tokens = jnp.asarray([[*b"a", speaker.tokenizer.convert_tokens_to_ids("<sep>")]], jnp.int32)
    hidden, _ = jax.jit(Decoder(speaker.spec).apply)(
        {"params": speaker.params}, tokens, jnp.arange(2)[None], tokens * 0 + 1
    )
    shares = scipy.special.softmax(np.float64(unembed(speaker.spec, speaker.params, hidden)[0, -1]) / 0.7)
    texts = generate(speaker, ["a"] * n, temperature=0.7, max_new_tokens=1, batch_size=128)
    for token in [token for token in np.argsort(-shares)[:4] if token < 127]:
        share = shares[token]
        assert abs(texts.count(chr(token)) / n - share) < 4.5 * np.sqrt(share * (1 - share) / n)


def test_each_bucket_compiles_once_wherever_an_adapter_comes_from(speaker, make_adapter, compiles):
    """Training leaves an adapter on a mesh of one device, a file on the device itself: that is no other program."""
    prompts = ["x" * n for n in (3, 5, 9, 20, 21, 22)]  # with <sep>: two of the buckets of 16
    adapter = make_adapter("user")
    one = jax.sharding.NamedSharding(make_mesh(devices=jax.devices()[:1]), jax.sharding.PartitionSpec())
    trained = adapter.replace(weights=jax.device_put(adapter.weights, one))
    for letter, put_on in (("x", None), ("x", adapter), ("y", trained)):
        asked = [prompt.replace("x", letter) for prompt in prompts]
        generate(speaker, asked, put_on, max_new_tokens=5, batch_size=3, seed=ord(letter))
        assert [compiles.count(f"jit({name})") for name in ("_start", "_advance")] == [2, 1]


def test_what_cannot_be_answered_is_one_line(speaker, tmp_path):
    limit = speaker.spec.max_length
    with pytest.raises(UserError, match=rf"prompt 1: {limit - 5 + 1} tokens and 6 new ones exceed the model's {limit}"):
        greedy(speaker, ["a", "b" * (limit - 5)])
    with pytest.raises(UserError, match=r"^prompts is a str; give a list of prompts$"):
        generate(speaker, "hello")
    with pytest.raises(UserError, match=r"^prompt 1 holds half a character \(\\ud83d\); write the character whole$"):
        generate(speaker, ["a", "\ud83d"])
    backend, template = speaker.tokenizer.backend_tokenizer, "{{ messages[0]['content'] }}"
    bare = type(speaker.tokenizer)(tokenizer_object=backend, chat_template=template, eos_token="<eos>")
    for prompts in (["a", ""], ["a", "", ""]):
        with pytest.raises(UserError, match="prompt 1 has no tokens, so nothing can follow: write a text"):
            generate(dataclasses.replace(speaker, tokenizer=bare), prompts)
    with pytest.raises(UserError, match="needs a Model, got str"):
        generate(str(tmp_path), ["a"])
    for token in (10**9, -1):
        with pytest.raises(UserError, match=f"a stop token is {token}: it must be a whole number from 0 to 263"):
            generate(dataclasses.replace(speaker, stop_tokens=(token,)), ["a"])


def test_a_row_brings_its_turns_and_a_typed_stop_is_text(speaker):
    row = Row((("user", "hi"), ("assistant", "yes"), ("user", "why")))
    assert speaker.tokenizer.decode(encode_prompt(speaker, row)) == "hi<sep>yes<eos>why<sep>"
    text = "a<eos>b<sep>"
    assert encode_prompt(speaker, text) == [*text.encode(), speaker.tokenizer.convert_tokens_to_ids("<sep>")]
    assert generate(speaker, []) == []


ASKED = ["a", "what is it?", "say it again, and again", "count to 3", "a"]


@pytest.fixture
def generated(monkeypatch):
    """How many answers each call generated."""
    counts, real = [], module.generate_batches

    def counting(*args, **options):
        counts.append(0)
        for batch in real(*args, **options):
            counts[-1] += len(batch)
            yield batch

    monkeypatch.setattr(module, "generate_batches", counting)
    return counts


@pytest.mark.parametrize("together", [1, 3])
def test_answers_are_those_of_generate_and_made_once(tiny, make_adapter, generated, tmp_path, together):
    adapters = {"none": None, "one": make_adapter("user"), "two": make_adapter("user", seed=3, rank=5)}
    settings = {"max_new_tokens": 6, "batch_size": 4}

    def run(*more):
        store = Store(tmp_path / "a.jsonl")
        return answer(tiny, [*ASKED, *more], adapters, store, together=together, **settings)

    expected = {name: generate(tiny, ASKED, adapter, **settings) for name, adapter in adapters.items()}
    generated.clear()
    said = run()
    assert said == expected
    assert len(set(map(tuple, said.values()))) == 3
    assert sum(generated) == 4 * 3 and len(generated) == (3 if together == 1 else 2), "equal prompts are one"
    assert run() == said and sum(generated) == 12
    run("new")
    assert sum(generated) == 12 + 3


def test_another_model_adapter_length_or_prompt_is_another_answer(tiny, make_tiny, make_adapter, generated):
    store = Store()
    ask = lambda model=tiny, prompt="a", adapter=None, tokens=5: answer(  # noqa: E731
        model, [prompt], {"x": adapter}, store, max_new_tokens=tokens, batch_size=1
    )
    ask()
    ask(make_tiny(rope_theta=7.0))
    ask(adapter=make_adapter("user"))
    ask(adapter=make_adapter("user", seed=1))
    ask(tokens=6)
    ask(prompt=Row((("user", "a"),), input="b"))
    assert sum(generated) == 6
    ask(prompt=Row((("user", "a"),)))
    assert sum(generated) == 6, "a row of one turn is its prompt"


def test_a_sampled_answer_does_not_depend_on_what_the_store_held(tiny):
    """It is drawn by its prompt's place among the prompts, so that is a part of its key."""
    settings = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3, "batch_size": 1}
    before = Store()
    answer(tiny, ["x", "why"], {"base": None}, before, **settings)
    expected = answer(tiny, ["why"], {"base": None}, Store(), **settings)
    assert answer(tiny, ["why"], {"base": None}, before, **settings) == expected


def test_a_greedy_answer_s_key_is_that_of_stores_on_disk(tiny):
    store, model = Store(), dataclasses.replace(tiny, fingerprint="f")
    answer(model, ["a"], {"base": None}, store, max_new_tokens=5, batch_size=1)
    assert key_of("f", "", 5, [97, tiny.tokenizer.convert_tokens_to_ids("<sep>")]) in store


def test_a_cut_run_goes_on_and_ends_as_an_undisturbed_one(tiny, generated, tmp_path):
    """At any byte: what a kill or a full disk leaves of the file."""
    path = tmp_path / "answers.jsonl"

    def run():
        answer(tiny, ASKED, {"base": None}, Store(path), max_new_tokens=6, batch_size=2)
        return path.read_bytes()

    whole = run()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in (0, 5, ends[0] - 1, ends[0], ends[1] + 7, len(whole) - 1):
        path.write_bytes(whole[:length])
        generated.clear()
        assert run() == whole and sum(generated) == 4 - sum(end <= length for end in ends)
