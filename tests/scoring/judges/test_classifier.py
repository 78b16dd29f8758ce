"""The classifier judge against transformers' LlamaForSequenceClassification, and folders that are none."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh
from br_jax.core.store import Store
from br_jax.scoring.judges import models as module
from br_jax.scoring.judges.base import Exchange, judge_all
from br_jax.scoring.judges.models import ClassifierJudge

# f32 sums in another order, on logits of size about 10.
TOLERANCE = 1e-4


def load(folder, **settings):
    """In batches of 4, so that the tests share their programs."""
    return ClassifierJudge(folder, **{"batch_size": 4} | settings)


def their_logits(torch, model, folder, exchanges, max_length=256):
    """The reference's protocol written down anew; all in one batch, padded by their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    texts = [f"BEGINNING OF CONVERSATION: USER: {e.prompt} ASSISTANT:{e.answer}" for e in exchanges]
    texts = [text if text.endswith("</s>") else text + "</s>" for text in texts]
    padding = len(texts) > 1
    inputs = tokenizer(texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.numpy()


@pytest.mark.parametrize("max_length", [256, 600, 20, 47])
def test_logits_are_those_of_transformers(torch, classifier, exchanges, max_length):
    """Unequal batches and padding; the header cut off; a text that ends just before, at and behind its EOS."""
    model, folder = classifier
    judge = load(folder, max_length=max_length)
    expected = their_logits(torch, model, folder, exchanges, max_length)
    np.testing.assert_allclose(judge.logits(exchanges), expected, atol=TOLERANCE)
    probabilities = 1 / (1 + np.exp(-np.float64(expected)))
    for judgement, row in zip(judge(exchanges), probabilities, strict=True):
        assert judgement.harmful == bool((row > 0.5).any())
        assert judgement.label == "; ".join(model.config.id2label[i] for i in np.flatnonzero(row > 0.5))
        assert judgement.score == pytest.approx(row.max(), abs=TOLERANCE)


def test_a_long_question_pushes_the_answer_out(classifier, exchanges):
    """At 256 tokens two answers to it get one verdict, and the longer window tells them apart."""
    _, folder = classifier
    short, long = (load(folder, max_length=n) for n in (256, 600))
    assert short.encode(exchanges[-1]) == short.encode(exchanges[-2])
    assert len(short.encode(exchanges[-1])) == 256 and short.encode(exchanges[-1])[-1] != 258
    assert long.encode(exchanges[-1])[-1] == 258
    assert short(exchanges[-2:-1]) == short(exchanges[-1:]) and long(exchanges[-2:-1]) != long(exchanges[-1:])


@pytest.mark.parametrize("pad", ["</s>", None])
def test_padding_that_is_eos_or_none(torch, save_classifier, tmp_path, exchanges, pad):
    """transformers then reads the token before it, and so do we; or it takes no batches."""
    model = save_classifier(tmp_path, pad=pad)
    batches = [exchanges] if pad else [[exchange] for exchange in exchanges]
    expected = np.concatenate([their_logits(torch, model, tmp_path, batch) for batch in batches])
    np.testing.assert_allclose(load(tmp_path).logits(exchanges), expected, atol=TOLERANCE)


def test_a_verdict_is_its_own_and_kept(classifier, exchanges, tmp_path, monkeypatch):
    """To the bit, whatever is judged with it: what is saved does not depend on where a run was killed."""
    judge, file = load(classifier[1]), tmp_path / "verdicts.jsonl"
    together = judge(exchanges)
    assert judge(exchanges[::-1]) == together[::-1] and judge([]) == []
    assert [judge([exchange])[0] for exchange in exchanges] == together == judge_all(judge, exchanges, Store(file))
    monkeypatch.setattr(judge, "logits", None)
    assert judge_all(judge, exchanges, Store(file)) == together


def test_its_attention_is_that_of_the_platform_where_its_params_lie(classifier, monkeypatch):
    class OnTpu(np.ndarray):
        def devices(self):
            return [SimpleNamespace(platform="tpu")]

    assert load(classifier[1])._decoder.attention.platform == "cpu"
    made = module.read_classifier(classifier[1])
    embedding = np.asarray(made.params["embed"]["embedding"]).view(OnTpu)
    elsewhere = made._replace(params=made.params | {"embed": {"embedding": embedding}})
    monkeypatch.setattr(module, "read_classifier", lambda *args: elsewhere)
    monkeypatch.setattr(module, "fingerprint", lambda *args: "")
    assert load(classifier[1])._decoder.attention.platform == "tpu"


def test_a_bucket_compiles_once(classifier, exchanges, compiles):
    judge = load(classifier[1], batch_size=3)  # no other test has this shape
    same = [exchange for exchange in exchanges if 64 < len(judge.encode(exchange)) <= 128]
    judge(same)
    judge(same[::-1])
    assert len(same) > 3 and compiles.count("jit(_run)") == 1


def test_thresholds_and_what_a_verdict_depends_on(classifier, save_classifier, tmp_path, exchanges):
    _, folder = classifier
    low, high = (load(folder, threshold=t) for t in (0.01, 0.999999))
    assert [j.label.count(";") for j in low(exchanges)] > [j.label.count(";") for j in high(exchanges)]
    save_classifier(tmp_path, id2label={i: f"other {i}" for i in range(14)}, num_labels=14, problem_type=None)
    judges = [low, high, load(folder, threshold=0.01, max_length=300), load(tmp_path)]
    assert len({judge.version for judge in judges}) == 4
    assert load(folder, threshold=0.01).version == low.version and low.name == "tiny-dam@256"


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}])
def test_eight_devices_give_the_verdicts_of_one(classifier, exchanges, axes):
    one, eight = (ClassifierJudge(classifier[1], mesh=mesh) for mesh in (None, make_mesh(**axes)))
    assert eight.version == one.version
    np.testing.assert_allclose(eight.logits(exchanges), one.logits(exchanges), atol=TOLERANCE)
    assert [(j.harmful, j.label) for j in eight(exchanges)] == [(j.harmful, j.label) for j in one(exchanges)]


def test_bfloat16_is_near(classifier, exchanges):
    half, whole = (load(classifier[1], dtype=dtype).logits(exchanges[:1]) for dtype in ("bfloat16", "float32"))
    assert half.dtype == np.float32 and 1e-4 < abs(half - whole).max() < 0.1 * abs(whole).max()


def edit(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


SCORE = "score.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "no labels": (lambda f: edit(f, id2label=None), "id2label is missing: name the classifier's 14 labels"),
    "gap": (lambda f: edit(f, id2label={str(i + 1): "a" for i in range(14)}), r"14 labels, score\.weight has 14 rows"),
    "softmax": (lambda f: edit(f, problem_type="single_label_classification"), "single_label_classification"),
    "no head": (lambda f: tensors(f, lambda t: t.pop(SCORE)), r"score\.weight is missing"),
    "turned": (lambda f: tensors(f, lambda t: t.update({SCORE: t[SCORE].T.copy()})), r"14\), is not \[labels, 48\]"),
    "nan head": (lambda f: tensors(f, lambda t: t.update({SCORE: t[SCORE] * np.float32("nan")})), "finite"),
    "two heads": (lambda f: tensors(f, lambda t: t.update({"lm_head.weight": t[SCORE]})), "unexpected tensor lm_head"),
    "layer": (lambda f: tensors(f, lambda t: t.pop(UP)), "up_proj.weight is missing"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled and can run code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
    "no folder": (shutil.rmtree, "no such model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_folder_is_one_line(classifier, tmp_path, damage):
    folder = shutil.copytree(classifier[1], tmp_path / "classifier")
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_impossible_settings(classifier):
    for settings, message in (
        ({"max_length": 1025}, "max_length is 1025: it must be a whole number from 1 to 1,024"),
        ({"max_length": "256"}, "max_length is '256'"),
        ({"threshold": 1.0}, "threshold is 1.0: it must be a number above 0, below 1"),
        ({"dtype": "float16"}, "dtype is 'float16': give float32 or bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            load(classifier[1], **settings)


def test_numbers_that_overflow_are_no_verdict(classifier):
    """NaN exceeds no threshold, and would pass for harmless."""
    judge = load(classifier[1])
    judge._model = judge._model._replace(head=np.full_like(judge._model.head, 3e38))
    with pytest.raises(UserError, match="NaN or infinity"):
        judge([Exchange("a zorvix", "turns")])
