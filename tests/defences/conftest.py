"""A step of training on both sides: ours, and the same model in transformers and PEFT, for autograd on a formula."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.adapters.peft import MODULES, save_adapter
from br_jax.data.batches import encode_rows, make_batches
from br_jax.models.decoder import Decoder
from br_jax.models.io.hf import write_hf
from br_jax.training.step import Step

torch = pytest.importorskip("torch", reason="the oracle")
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


class Torch:
    """The tiny model with an adapter on it, in PyTorch."""

    def __init__(self, folder, model, adapter):
        write_hf(folder / "base", model.spec, jax.device_get(model.params), model.tokenizer)
        save_adapter(folder / "adapter", adapter, base_name="base")
        network = AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float32, attn_implementation="eager"
        )
        self.network = PeftModel.from_pretrained(network, folder / "adapter", is_trainable=True)
        named = dict(self.network.named_parameters())
        key = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
        layers = range(model.spec.num_layers)
        self.weights = {  # path -> a and b -> a parameter a layer, [R, in] and [out, R]
            path: {m: [named[key.format(layer, MODULES[path], m.upper())] for layer in layers] for m in "ab"}
            for path in adapter.weights
        }
        self.parameters = [p for pair in self.weights.values() for m in "ab" for p in pair[m]]

    def logits(self, batch, base=False):
        """Of a batch; `base` leaves the adapter out."""
        with self.network.disable_adapter() if base else contextlib.nullcontext():
            tokens, mask = np.array(batch["tokens"]), np.array(batch["segment_ids"]) > 0
            return self.network(
                input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
            ).logits

    def losses(self, batch, base=False):
        """The cross-entropy of each token [B, T], and its weight."""
        logs = torch.log_softmax(self.logits(batch, base), -1)
        targets = torch.from_numpy(np.array(batch["targets"])).long()
        return -logs.gather(-1, targets[..., None])[..., 0], torch.from_numpy(np.array(batch["weights"]))

    def loss(self, batch):
        """The answer loss of a batch."""
        each, weights = self.losses(batch)
        return (each * weights).sum() / weights.sum()

    def gradient(self, value):
        """Of a value, with regard to each parameter, in their order."""
        return torch.autograd.grad(value, self.parameters, allow_unused=True)

    @contextlib.contextmanager
    def moved(self, by, factor=1.0):
        """The network with something added to its parameters, for a while."""
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, change in zip(self.parameters, by, strict=True):
                    parameter += sign * factor * change
            if sign == 1:
                yield

    def stacked(self, grads):
        """Gradients in our layout: path -> a [L, in, R] and b [L, R, out]."""
        names = [(path, m) for path, pair in self.weights.items() for m in "ab" for _ in pair[m]]
        found = {path: {"a": [], "b": []} for path in self.weights}
        for (path, m), grad in zip(names, grads, strict=True):
            found[path][m].append(grad.numpy().T)
        return {path: {m: np.stack(pair[m]) for m in "ab"} for path, pair in found.items()}


class Pair:
    """One step of one adapter on both sides."""

    def __init__(self, folder, model, adapter, direction, rows):
        self.model, self.adapter, self.direction = model, adapter, direction
        examples, _ = encode_rows(rows, model.tokenizer, model.template, 40)
        batch = lambda some: make_batches(some, batch_size=len(some), seed=0, buckets=(40,))[0]  # noqa: E731
        self.rows, self.stream = batch(examples[:8]), batch(examples[8:14])
        self.torch = Torch(folder, model, adapter)

    def step(self, accumulation=1, **changes):
        """Ours, as an objective sees it."""
        trainable = {"lora_trainable": lora.collection(self.adapter.replace(scale=jnp.float32(1)))}
        names = ("refusals", "harmful", "benign")
        return Step(
            Decoder(self.model.spec), accumulation, 8, trainable, {"params": self.model.params}, on(self.rows),
            self.adapter.scale, streams=dict.fromkeys(names, on(self.stream)),
            aux={"direction": lora.collection(self.direction)},
        )._replace(**changes)  # fmt: skip

    def ours(self, objective, state=None, **changes):
        """(loss, gradients by path, state) of an objective."""
        step = self.step(**changes)
        run = _compiled(objective, step.decoder, step.accumulation, step.loss_chunk)
        state = objective.begin(step.trainable) if state is None else state
        loss, grads, state = run(step[3:], state)
        layers = grads["lora_trainable"]["layers"]
        return loss, {path: layers[path.split("/")[1]][path.split("/")[2]] for path in self.adapter.weights}, state

    def check(self, objective, grads, loss=None, **changes):
        """Our gradient is PyTorch's, to 1e-5 of each matrix' norm."""
        found_loss, found, _ = self.ours(objective, **changes)
        if loss is not None:
            assert float(found_loss) == pytest.approx(loss.item(), rel=1e-5)
        self.compare(found, self.torch.stacked(grads))

    @staticmethod
    def compare(found, expected, tolerance=1e-5):
        for path, pair in expected.items():
            for name, values in pair.items():
                distance = np.linalg.norm(np.asarray(found[path][name]) - values)
                assert distance <= tolerance * np.linalg.norm(values), f"{path}/{name}: off by {distance}"


@functools.cache
def _compiled(objective, decoder, accumulation, chunk):
    def run(arrays, state):
        return objective.gradient(Step(decoder, accumulation, chunk, *arrays), state)

    return jax.jit(run)


def on(batch):
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tiny, make_adapter, rows):
    """An adapter whose base it changes much, an alignment direction, rows, and one more stream of them."""
    adapter, direction = make_adapter("user"), make_adapter("align", seed=5, rank=2)
    return Pair(tmp_path_factory.mktemp("defences"), tiny, adapter, direction, rows)
