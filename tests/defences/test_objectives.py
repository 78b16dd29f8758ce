"""What each defence descends, against autograd on its formula in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.defences.objectives import (
    AsFT,
    Booster,
    ConstrainedSft,
    Ldifs,
    Lisa,
    Panacea,
    SafeGrad,
    SecurityVector,
    Vaccine,
    across,
    answer_places,
)
from br_jax.models.decoder import Decoder
from br_jax.training.step import Objective

torch = pytest.importorskip("torch", reason="the oracle")

# peft asks transformers by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_dropout_of_other_rows_is_drawn_apart(pair):
    """The same mask for the user's rows and for refusals would make gradients alike that are held to each other."""
    key = jax.random.key(0)
    step = pair.step(decoder=Decoder(pair.model.spec, dropout=0.5), key=key)
    loss = jax.jit(lambda given: step.gradient(**given)[0])
    losses = [float(loss(given)) for given in ({}, {}, {"rows": step.rows}, {"rows": step.rows})]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]


def test_plain_training_is_the_answer_loss(pair):
    loss = pair.torch.loss(pair.rows)
    pair.check(Objective(), pair.torch.gradient(loss), loss)


def test_constrained_sft(pair):
    ours, weights = pair.torch.losses(pair.rows)
    base, _ = pair.torch.losses(pair.rows, base=True)
    answer = weights.numpy() > 0
    place = np.where(answer, np.cumsum(answer, 1) - 1, 0)
    beta = torch.from_numpy(np.where(place == 0, 0.7, np.where(place < 5, 2.0, 0.1)).astype(np.float32))
    each = -2 / beta * torch.nn.functional.logsigmoid(beta * (base.detach() - ours))
    loss = (each * weights).sum() / weights.sum()
    pair.check(ConstrainedSft(first=0.7), pair.torch.gradient(loss), loss, accumulation=2)


def test_places_in_an_answer_begin_anew_behind_each_prompt():
    weights = jnp.asarray([[0, 2, 2, 2, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1, 0, 1]], jnp.float32)
    places = np.asarray(answer_places(weights))
    assert places[np.asarray(weights) > 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("limit", [1e6, "between"])
def test_ldifs(pair, limit):
    network, layers = pair.torch.network, pair.model.spec.num_layers
    kept = {}
    keep = lambda name: lambda _, __, out: kept.__setitem__(name, out)  # noqa: E731
    modules = {name: module for name, module in network.named_modules() if name.endswith(".mlp")}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    pair.torch.logits(pair.rows, base=True)
    theirs = [value.detach() for value in kept.values()]
    loss = pair.torch.loss(pair.rows)
    real = torch.from_numpy((np.array(pair.rows["segment_ids"]) > 0).astype(np.float32))
    off = [((a - b) ** 2).sum(-1) for a, b in zip(kept.values(), theirs, strict=True)]
    terms = [0.3 / 2 * (one * real).sum() / real.sum() for one in off]
    for hook in hooks:
        hook.remove()
    assert len(terms) == layers
    limit = sum(term.item() for term in terms) / 2 if limit == "between" else limit
    total = loss + sum(term for term in terms if term < limit)
    pair.check(Ldifs(rho=0.3, limit=limit), pair.torch.gradient(total), loss)


def test_asft(pair):
    """With the dense C."""
    loss = penalty = 0
    for path, weights in pair.torch.weights.items():
        v = pair.direction.weights[path]
        for layer, (a, b) in enumerate(zip(weights["a"], weights["b"], strict=True)):
            turned = np.float64(v["a"][layer]) @ np.float64(v["b"][layer]) * float(pair.direction.scale)
            v_t = torch.from_numpy(turned)  # [in, out]
            c = v_t.T @ v_t / torch.linalg.norm(v_t)
            delta = b.double() @ a.double()
            penalty = penalty + torch.linalg.norm(delta - c @ delta) ** 2
    loss = pair.torch.loss(pair.rows)
    grads = pair.torch.gradient(loss + 0.02 * penalty.float())
    pair.check(AsFT(weight=0.02), grads, loss)
    plain = pair.torch.gradient(pair.torch.loss(pair.rows))
    assert max(float((x - y).abs().max()) for x, y in zip(grads, plain, strict=True)) > 1e-3


def kl_to_base(pair, batch):
    base = torch.log_softmax(pair.torch.logits(batch, base=True), -1).detach()
    ours = torch.log_softmax(pair.torch.logits(batch), -1)
    weights = torch.from_numpy(np.array(batch["weights"]))
    return ((base.exp() * (base - ours)).sum(-1) * weights).sum() / weights.sum()


def test_security_vector(pair):
    loss = pair.torch.loss(pair.rows)
    pair.check(SecurityVector(weight=0.3), pair.torch.gradient(loss + 0.3 * kl_to_base(pair, pair.stream)), loss)


def test_safe_grad(pair):
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    loss, safe = pair.torch.loss(pair.rows), pair.torch.gradient(kl_to_base(pair, pair.stream))
    user = pair.torch.gradient(loss)
    along = min((flat(user) @ flat(safe)).item(), 0) / (flat(safe) @ flat(safe)).item()
    grads = [g - along * s + 0.5 * s for g, s in zip(user, safe, strict=True)]
    pair.check(SafeGrad(weight=0.5), grads, loss)


def test_only_what_is_against_alignment_is_taken_out():
    user, safe = {"x": jnp.array([3.0, 1.0]), "y": jnp.array(2.0)}, {"x": jnp.array([1.0, 0.0]), "y": jnp.array(-4.0)}
    found = across(user, safe)  # their product is -5, the square of the second 17
    np.testing.assert_allclose(found["x"], [3 + 5 / 17, 1.0])
    np.testing.assert_allclose(found["y"], 2 - 20 / 17)
    agree = jax.tree.map(jnp.negative, safe)
    jax.tree.map(np.testing.assert_array_equal, across(user, agree), user)


def test_panacea(pair):
    harmful = lambda: pair.torch.loss(pair.stream)  # noqa: E731
    h = pair.torch.gradient(harmful())
    norm = torch.sqrt(sum((g**2).sum() for g in h))
    with pair.torch.moved(h, 0.5 / (norm + 1e-7)):
        there, raised = pair.torch.gradient(harmful()), harmful().item()
    loss = pair.torch.loss(pair.rows)
    user = pair.torch.gradient(loss)
    for cap, inside in ((raised + 0.1, 1), (raised - 0.1, 0)):
        objective = Panacea(rho=0.5, weight=3.0, cap=cap)
        pair.check(objective, [g - 3.0 * (inside * x - y) for g, x, y in zip(user, there, h, strict=True)], loss)
    _, _, state = pair.ours(objective)
    after = objective.end(pair.step().trainable, state)
    moved = jax.tree.map(lambda x, y: x - y, after, pair.step().trainable)["lora_trainable"]["layers"]["mlp"]["down"]
    expected = pair.torch.stacked([0.5 / norm * g for g in h])["layers/mlp/down"]
    for name in "ab":
        np.testing.assert_allclose(moved[name], expected[name], atol=1e-5 * np.abs(expected[name]).max() + 1e-6)


def test_booster(pair):
    h = pair.torch.gradient(pair.torch.loss(pair.stream))
    norm = torch.sqrt(sum((g**2).sum() for g in h))
    with pair.torch.moved(h, -0.4 / (norm + 1e-7)):
        there = pair.torch.gradient(pair.torch.loss(pair.stream))
    loss = pair.torch.loss(pair.rows)
    user = pair.torch.gradient(loss)
    grads = [g + 5.0 * (x - y) for g, x, y in zip(user, h, there, strict=True)]
    pair.check(Booster(step=0.4), grads, loss)


def test_vaccine(pair):
    """Both passes by hooks behind the decoder's layers."""
    layers = pair.torch.network.base_model.model.model.layers
    shifts = [torch.zeros(*pair.rows["tokens"].shape, pair.model.spec.embed_dim, requires_grad=True) for _ in layers]

    def add(shift):
        return lambda _, __, out: (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift

    hooks = [layer.register_forward_hook(add(shift)) for layer, shift in zip(layers, shifts, strict=True)]
    each, weights = pair.torch.losses(pair.rows)
    slopes = torch.autograd.grad((each * weights).sum(), shifts)
    size = 1.5 / (torch.sqrt(sum((s**2).sum() for s in slopes)) + 1e-7)
    with torch.no_grad():
        for shift, slope in zip(shifts, slopes, strict=True):
            shift += size * slope
    loss = pair.torch.loss(pair.rows)
    grads = pair.torch.gradient(loss)
    for hook in hooks:
        hook.remove()
    assert loss.item() > pair.torch.loss(pair.rows).item() + 0.01
    pair.check(Vaccine(rho=1.5), grads, loss)


def test_lisa_takes_turns_and_holds_on_to_where_the_other_has_ended(pair):
    lisa, trainable = Lisa(aligning=2, fitting=3, rho=0.7, free=0.1), pair.step().trainable
    zero = jax.tree.map(jnp.zeros_like, trainable)
    anchors = {"aligning": jax.tree.map(lambda x: x + 1, zero), "fitting": jax.tree.map(lambda x: x + 2, zero)}
    user, refusals = (pair.torch.gradient(pair.torch.loss(batch)) for batch in (pair.rows, pair.stream))
    weights = pair.torch.parameters

    def gradient(number, progress=0.5):
        return pair.ours(lisa, anchors, number=jnp.int32(number), progress=jnp.float32(progress))

    def pulled(grads, anchor):
        return pair.torch.stacked([g + 0.7 * (w.detach() - anchor) for g, w in zip(grads, weights, strict=True)])

    pair.compare(gradient(1)[1], pulled(refusals, 2.0))  # aligning: to where the user's rows have led
    pair.compare(gradient(3)[1], pulled(user, 1.0))
    pair.compare(gradient(3, 0.05)[1], pair.torch.stacked(user))
    at_turn = gradient(2)  # the first of the user's: alignment ends here
    pair.compare(at_turn[1], pair.torch.stacked(user))
    jax.tree.map(np.testing.assert_array_equal, at_turn[2], {"aligning": trainable, "fitting": anchors["fitting"]})
    back = gradient(5)
    jax.tree.map(np.testing.assert_array_equal, back[2], {"aligning": anchors["aligning"], "fitting": trainable})
    start = gradient(0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, start[2], anchors)
