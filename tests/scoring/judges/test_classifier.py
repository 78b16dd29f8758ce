"""The classifier judge against transformers' LlamaForSequenceClassification, and folders that are none."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from br_jax.errors import UserError
from br_jax.scoring.judges.classifier import ClassifierJudge
from br_jax.scoring.judges.judging import Exchange, judge_all
from br_jax.sharding import make_mesh
from br_jax.store import Store

# f32 sums in another order, on logits of size about 10.
TOLERANCE = 1e-4


def text_of(exchange):
    """Written down anew from the reference's protocol."""
    text = "BEGINNING OF CONVERSATION: USER: " + exchange.prompt + " ASSISTANT:" + exchange.answer
    return text if text.endswith("</s>") else text + "</s>"


def their_logits(torch, model, folder, exchanges, max_length):
    """All in one batch, padded by their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    texts = [text_of(exchange) for exchange in exchanges]
    padding = len(texts) > 1
    inputs = tokenizer(texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.numpy()


@pytest.mark.parametrize("max_length", [256, 600, 20, 47])
def test_logits_are_those_of_transformers(torch, classifier, exchanges, max_length):
    """Unequal batches and padding; the header cut off; a text that ends just before, at and behind its EOS."""
    model, folder = classifier
    judge = ClassifierJudge(folder, max_length=max_length, batch_size=4)
    expected = their_logits(torch, model, folder, exchanges, max_length)
    np.testing.assert_allclose(judge.logits(exchanges), expected, atol=TOLERANCE)
    probabilities = 1 / (1 + np.exp(-np.float64(expected)))
    for judgement, row in zip(judge(exchanges), probabilities, strict=True):
        assert judgement.harmful == bool((row > 0.5).any())
        assert judgement.label == "; ".join(model.config.id2label[i] for i in np.flatnonzero(row > 0.5))
        assert judgement.score == pytest.approx(row.max(), abs=TOLERANCE)


def test_a_pipeline_says_the_same(classifier, exchanges):
    from transformers import pipeline

    model, folder = classifier
    pipe = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    judge = ClassifierJudge(folder)
    found = jax.nn.sigmoid(judge.logits(exchanges))
    for row, exchange in zip(np.asarray(found), exchanges, strict=True):
        said = pipe(text_of(exchange), top_k=None, function_to_apply="sigmoid", truncation=True, max_length=256)
        scores = {entry["label"]: entry["score"] for entry in said}
        np.testing.assert_allclose(row, [scores[label] for label in judge.labels], atol=TOLERANCE)


def test_a_long_question_pushes_the_answer_out(classifier, exchanges):
    """At 256 tokens two answers to it get one verdict, and the longer window tells them apart."""
    _, folder = classifier
    short, long = (ClassifierJudge(folder, max_length=n) for n in (256, 600))
    assert short.encode(exchanges[-1]) == short.encode(exchanges[-2])
    assert len(short.encode(exchanges[-1])) == 256 and short.encode(exchanges[-1])[-1] != 258
    assert long.encode(exchanges[-1])[-1] == 258
    assert short(exchanges[-2:-1]) == short(exchanges[-1:]) and long(exchanges[-2:-1]) != long(exchanges[-1:])


def test_padding_that_is_eos(torch, save_classifier, tmp_path, exchanges):
    """transformers then reads the token before it, and so do we."""
    model = save_classifier(tmp_path, pad="</s>")
    found = ClassifierJudge(tmp_path).logits(exchanges)
    np.testing.assert_allclose(found, their_logits(torch, model, tmp_path, exchanges, 256), atol=TOLERANCE)


def test_no_padding_token(torch, save_classifier, tmp_path, exchanges):
    """Then transformers takes no batches."""
    model = save_classifier(tmp_path, pad=None)
    found = ClassifierJudge(tmp_path).logits(exchanges)
    one_by_one = [their_logits(torch, model, tmp_path, [exchange], 256) for exchange in exchanges]
    np.testing.assert_allclose(found, np.concatenate(one_by_one), atol=TOLERANCE)


def test_a_verdict_is_its_own(classifier, exchanges):
    """To the bit, whatever is judged with it: what is saved does not depend on where a run was killed."""
    judge = ClassifierJudge(classifier[1], batch_size=4)
    together = judge(exchanges)
    assert judge(exchanges[::-1]) == together[::-1]
    assert [judge([exchange])[0] for exchange in exchanges] == together
    assert judge([]) == []


def test_a_bucket_compiles_once(classifier, exchanges, compiles):
    judge = ClassifierJudge(classifier[1], batch_size=3)  # no other test has this shape
    judge(exchanges)
    widths = {64 if len(ids) <= 64 else 128 if len(ids) <= 128 else 256 for ids in map(judge.encode, exchanges)}
    assert len(widths) == 3 and compiles.count("jit(_run)") == 3
    judge(exchanges)
    assert compiles.count("jit(_run)") == 3


def test_thresholds_and_what_a_verdict_depends_on(classifier, save_classifier, tmp_path, exchanges):
    _, folder = classifier
    low, high = (ClassifierJudge(folder, threshold=t) for t in (0.01, 0.999999))
    assert [j.label.count(";") for j in low(exchanges)] > [j.label.count(";") for j in high(exchanges)]
    save_classifier(tmp_path, id2label={i: f"other {i}" for i in range(14)})
    judges = [low, high, ClassifierJudge(folder, threshold=0.01, max_length=300), ClassifierJudge(tmp_path)]
    assert len({judge.version for judge in judges}) == 4
    assert ClassifierJudge(folder, threshold=0.01).version == low.version
    assert low.name == "tiny-dam@256"


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}])
def test_eight_devices_give_the_verdicts_of_one(classifier, exchanges, axes):
    one = ClassifierJudge(classifier[1])
    eight = ClassifierJudge(classifier[1], mesh=make_mesh(**axes))
    assert eight.version == one.version
    np.testing.assert_allclose(eight.logits(exchanges), one.logits(exchanges), atol=TOLERANCE)
    assert [(j.harmful, j.label) for j in eight(exchanges)] == [(j.harmful, j.label) for j in one(exchanges)]


def test_bfloat16_is_near(classifier, exchanges):
    half = ClassifierJudge(classifier[1], dtype="bfloat16").logits(exchanges)
    whole = ClassifierJudge(classifier[1]).logits(exchanges)
    assert half.dtype == np.float32 and 1e-4 < abs(half - whole).max() < 0.1 * abs(whole).max()


def test_verdicts_are_kept(classifier, exchanges, tmp_path, monkeypatch):
    file = tmp_path / "verdicts.jsonl"
    judge = ClassifierJudge(classifier[1], batch_size=4)
    first = judge_all(judge, exchanges, Store(file))
    assert first == judge(exchanges)
    monkeypatch.setattr(judge, "logits", None)
    assert judge_all(judge, exchanges, Store(file)) == first


def edit(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


SCORE = "score.weight"
DAMAGE = {
    "no labels": (lambda f: edit(f, id2label=None), "id2label is missing: name the classifier's 14 labels"),
    "empty labels": (lambda f: edit(f, id2label={}), "id2label is missing"),
    "fewer": (lambda f: edit(f, id2label={"0": "a", "1": "b"}), r"2 labels, score\.weight has 14 rows"),
    "gap": (
        lambda f: edit(f, id2label={str(i + 1): "a" for i in range(14)}),
        r"14 labels, score\.weight has 14 rows: name 0 to 13",
    ),
    "softmax": (lambda f: edit(f, problem_type="single_label_classification"), "single_label_classification"),
    "no head": (lambda f: tensors(f, lambda t: t.pop(SCORE)), r"score\.weight is missing"),
    "reward model": (lambda f: tensors(f, lambda t: t.update({"score_head.weight": t.pop(SCORE)})), "is missing"),
    "head turned": (
        lambda f: tensors(f, lambda t: t.update({SCORE: t[SCORE].T.copy()})),
        r"\(48, 14\), is not \[labels, 48\]",
    ),
    "nan head": (lambda f: tensors(f, lambda t: t.update({SCORE: t[SCORE] * np.float32("nan")})), "finite"),
    "another head": (
        lambda f: tensors(f, lambda t: t.update({"lm_head.weight": t[SCORE]})),
        "unexpected tensor lm_head",
    ),
    "layer": (lambda f: tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "up_proj.weight is missing"),
    "pickled": (pickled, "pickled and can run code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_folder_is_one_line(save_classifier, tmp_path, damage):
    save_classifier(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ClassifierJudge(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_num_labels_may_be_said_and_must_fit(save_classifier, tmp_path):
    save_classifier(tmp_path)
    edit(tmp_path, num_labels=14, problem_type=None)
    assert len(ClassifierJudge(tmp_path).labels) == 14
    edit(tmp_path, num_labels=13)
    with pytest.raises(UserError, match="14 rows"):
        ClassifierJudge(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1025}, "reads 1 to 1024 tokens"),
        ({"max_length": 0}, "reads 1 to 1024 tokens"),
        ({"max_length": "256"}, "reads 1 to 1024 tokens"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"threshold": 50}, "between 0 and 1"),
        ({"dtype": "float16"}, "use float32 or bfloat16"),
    ],
)
def test_impossible_settings(classifier, settings, message):
    with pytest.raises(UserError, match=message):
        ClassifierJudge(classifier[1], **settings)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such model"):
        ClassifierJudge(tmp_path / "none")


def test_numbers_that_overflow_are_no_verdict(classifier):
    """NaN exceeds no threshold, and would pass for harmless."""
    judge = ClassifierJudge(classifier[1])
    judge._model = judge._model._replace(head=np.full_like(judge._model.head, 3e38))
    with pytest.raises(UserError, match="NaN or infinity"):
        judge([Exchange("a zorvix", "turns")])
