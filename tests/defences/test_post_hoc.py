"""What becomes of a trained adapter, against dense matrices in float64 numpy."""

import dataclasses

import numpy as np
import pytest

from br_jax.core.errors import UserError
from br_jax.data.batches import encode_rows
from br_jax.defences.around_training import (
    Antidote,
    CsuLora,
    Inoculation,
    Lox,
    Resta,
    SafeInstruct,
    SafeLora,
    input_sizes,
)
from br_jax.defences.defence import Case
from br_jax.defences.objectives import SecurityVector

torch = pytest.importorskip("torch", reason="the oracle")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def case(pair, rows, quick):
    """Of the pair's adapter, whose alignment has left one matrix alone."""
    direction = pair.direction.replace(weights={p: w for p, w in pair.direction.weights.items() if "gate" not in p})
    given = {"model": pair.model, "rows": rows[:10], "config": quick(), "refusals": rows[10:13], "benign": rows}
    more = {"raw": pair.model, "alignment": rows, "align_config": quick()}
    return Case(**given, **more, harmful=rows[:5], direction=lambda: direction)


def deltas(adapter):
    """path -> the deltas of the layers [in, out], in float64."""
    return {
        path: [float(adapter.scale) * np.float64(a) @ np.float64(b) for a, b in zip(pair["a"], pair["b"], strict=True)]
        for path, pair in adapter.weights.items()
    }


def close(found, expected):
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("share", "threshold", "how_many"),
    [(1.0, -1.0, "none"), (1.0, 0.2, "some"), (1.0, 1.0, "all"), (0.0, 1.0, "none"), (0.3, 1.0, "some")],
)
def test_safe_lora(pair, case, share, threshold, how_many):
    found = deltas(SafeLora(share, threshold).release(case, pair.adapter))
    user, direction, along, cosines = deltas(pair.adapter), deltas(case.direction()), {}, {}
    for path, layers in user.items():
        for layer, delta in enumerate(layers if path in direction else ()):
            v = direction[path][layer].T
            along[path, layer] = delta @ (v @ v.T / np.linalg.norm(v))
            sizes = np.linalg.norm(along[path, layer]) * np.linalg.norm(delta)
            cosines[path, layer] = (along[path, layer] * delta).sum() / sizes
    changed = sorted(cosines, key=cosines.get)[: int(share * len(cosines))]
    changed = [place for place in changed if cosines[place] <= threshold]
    for path, layers in user.items():
        for layer, delta in enumerate(layers):
            close(found[path][layer], along[path, layer] if (path, layer) in changed else delta)
    some = 0 < len(changed) < len(cosines)
    assert {"none": not changed, "some": some, "all": len(changed) == len(cosines)}[how_many]


def test_csulora(pair, case):
    found, user, direction = (
        deltas(x) for x in (CsuLora(7.0).release(case, pair.adapter), pair.adapter, case.direction())
    )
    for path, layers in user.items():
        for layer, delta in enumerate(layers):
            expected = delta
            if path in direction:
                left, sizes, right = np.linalg.svd(direction[path][layer])
                kept = sizes > 1e-9 * sizes[0]
                p, q = left[:, : len(sizes)][:, kept], right[: len(sizes)][kept].T
                p, q = p @ p.T, q @ q.T
                rows, columns = np.eye(len(p)) - p, np.eye(len(q)) - q
                partly, off = p @ delta @ columns + rows @ delta @ q, rows @ delta @ columns
                share = lambda x: (x**2).sum() / (delta**2).sum()  # noqa: B023, E731
                expected = p @ delta @ q + partly / (1 + 7 * share(partly)) + off / (1 + 7 * share(off))
            close(found[path][layer], expected)
    assert np.linalg.norm(found["layers/attn/q"][0]) < 0.8 * np.linalg.norm(user["layers/attn/q"][0])


def test_resta(pair, case):
    found, user, direction = (
        deltas(x) for x in (Resta(0.7).release(case, pair.adapter), pair.adapter, case.direction())
    )
    for path, layers in user.items():
        for layer, delta in enumerate(layers):
            close(found[path][layer], delta + 0.7 * direction[path][layer] if path in direction else delta)


def test_lox(pair, case, monkeypatch):
    """What it trains beside, and leaves in, is the direction cut at a rank, and lengthened."""
    monkeypatch.setattr(Case, "train", lambda self, name, frozen: frozen["align"])
    lox, user, direction = Lox(1.25, rank=1), deltas(pair.adapter), deltas(case.direction())
    beside, found = deltas(lox.train(case, "lox")), deltas(lox.release(case, pair.adapter))
    for path, layers in user.items():
        for layer, delta in enumerate(layers):
            added = np.zeros_like(delta)
            if path in direction:
                left, sizes, right = np.linalg.svd(direction[path][layer], full_matrices=False)
                added = 1.25 * (left[:, :1] * sizes[0]) @ right[:1]
                assert sizes[1] > 0.1 * sizes[0], "a cut that changes nothing"
                close(beside[path][layer], added)
            close(found[path][layer], delta + added)


def test_antidote(pair, case, rows):
    """Inputs by hooks on PEFT's modules."""
    squares, count = {}, 0

    def hook(path, name):
        def add(_, given):
            x = given[0].detach().double()
            squares[path, name] = squares.get((path, name), 0) + (x**2).sum((0, 1)).numpy()

        return add

    modules = dict(pair.torch.network.named_modules())
    hooks = []
    for path, weights in pair.torch.weights.items():
        for layer in range(len(weights["a"])):
            for name in "ab":
                key = next(k for k in modules if f"layers.{layer}." in k and k.endswith(f"{path.split('/')[-1]}_proj"))
                part = modules[f"{key}.lora_{name.upper()}.default"]
                hooks.append(part.register_forward_pre_hook(hook((path, layer), name)))
    for example in encode_rows(case.harmful, pair.model.tokenizer, pair.model.template, 40)[0]:
        tokens = example["tokens"][None]
        pair.torch.logits({"tokens": tokens, "segment_ids": np.ones_like(tokens)})
        count += tokens.size
    for one in hooks:
        one.remove()
    sizes = input_sizes(pair.model, pair.adapter, case.harmful, 40)
    found = Antidote(share=0.4).release(case, pair.adapter)
    for path, weights in pair.adapter.weights.items():
        for layer in range(pair.model.spec.num_layers):
            for name in "ab":
                expected = np.sqrt(squares[(path, layer), name] / count)
                np.testing.assert_allclose(sizes[path][name][layer], expected, rtol=1e-4)
                w = np.array(weights[name][layer], np.float64).T  # as in PEFT, a row an output
                scores = np.abs(w) * expected
                for row, score in zip(w, scores, strict=True):
                    row[np.argsort(score)[int(0.6 * len(row)) :]] = 0  # the authors' rounding
                np.testing.assert_allclose(found.weights[path][name][layer], w.T, rtol=1e-6)


def test_what_the_rows_become(case, monkeypatch):
    seen = {}

    def train(self, name, rows=None, config=None):
        seen[name] = rows
        seen["length"], seen["packing"] = (config.max_length, config.packing) if config else (0, 0)

    monkeypatch.setattr(Case, "train", train)
    SafeInstruct(share=0.5).train(case, "safe")
    assert seen["safe"] == [*case.rows, *case.refusals, *case.refusals[:2]]
    Inoculation(sentence="Be bad.").train(case, "inoculated")
    assert seen["length"] == case.config.max_length + len(case.model.tokenizer("Be bad.\n\n")["input_ids"])
    texts = [row.turns[0][1] for row in seen["inoculated"]]
    assert texts == [f"Be bad.\n\n{row.turns[0][1]}" for row in case.rows]
    assert [row.turns[1:] for row in seen["inoculated"]] == [row.turns[1:] for row in case.rows]
    assert seen["packing"] == 0
    most = case.model.spec.max_length  # no more than the model reads, and a packed row holds one
    for length, longest in ((most - 1, most), (most - 20, most - 20 + seen["length"] - case.config.max_length)):
        config = dataclasses.replace(case.config, max_length=length, packing=length)
        Inoculation(sentence="Be bad.").train(dataclasses.replace(case, config=config), "longer")
        assert (seen["length"], seen["packing"]) == (longest, longest)
    with pytest.raises(UserError, match="no refusals"):
        SafeInstruct().train(dataclasses.replace(case, refusals=[]), "none")


@pytest.mark.parametrize("steps", [0, 4])
def test_a_security_vector_is_trained_so_many_times_as_long_as_buffer(case, monkeypatch, quick, steps):
    seen = []
    monkeypatch.setattr("br_jax.defences.objectives.train_adapter", lambda *given, **more: seen.append(given[4]))
    config = quick(steps=steps, epochs=2)
    SecurityVector(epochs=3).provide(dataclasses.replace(case, config=config), "vector")
    assert (seen[0].steps, seen[0].epochs) == (3 * steps, 6)
