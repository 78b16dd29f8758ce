"""Why it works: what a gradient step does to safety, the loss round a model, what a merge can change.

The Safety Gradient Score says whether a step of training goes along alignment or against it, layer by layer:
S_l = <-grad_W L, v_l> / ||v_l||, with v_l what a refusal LoRA adds to layer l: above 0 a step adds to safety, below 0
it takes some away. Every layer comes of one backward pass: with W + t_l v_l at t = 0, dL/dt_l = <grad_W L, v_l>.
Beside the gradient's own length the score says whether something shrinks the gradient or turns it away from v.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import factors, inner_product, output_spaces, removed_shares
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.errors import UserError
from br_jax.core.io import write_bytes
from br_jax.core.mesh import mesh_of, shard
from br_jax.core.progress import progress
from br_jax.data.rows import Row
from br_jax.defences.objectives import inner
from br_jax.experiment.run import Experiment
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.report import plots
from br_jax.report.markdown import write_document
from br_jax.training.batching import one_pass, summed
from br_jax.training.loss import batch_loss
from br_jax.training.run import train_adapter

PerLayer = dict[str, Float[np.ndarray, " L"]]  # path of the matrix -> a number a layer


def safety_gradients(
    model: Model, safety: Adapter, rows: Sequence[Row], attached: Mapping[str, Adapter] | None = None, **batching: int
) -> PerLayer:
    """<-grad_W L, v_l> of each matrix and layer, L the mean loss of rows, all of which count alike.

    `safety` is v, for instance a LoRA that was trained on refusals, without Buffer; `attached` are adapters on the
    model, such as Buffer or a user's. Rows are cut at `max_length` (512), `batch_size` (16) at a time.
    """
    along = shard(lora.collection(safety), mesh_of(model.params))
    gates = {path: jnp.zeros(pair["a"].shape[0], jnp.float32) for path, pair in safety.weights.items()}
    of = functools.partial(_slopes, model.decoder, gates, model.params, along)
    sums, total = _sums(model, rows, attached, of, **batching)
    return {path: -np.asarray(slope) / total for path, slope in sums.items()}


def gradient_norms(
    model: Model, paths: Collection[str], rows: Sequence[Row], attached: Mapping[str, Adapter] | None = None, **batching
) -> PerLayer:
    """||grad_W L|| of each matrix in `paths` and layer, else as `safety_gradients`; holds a gradient of their size."""
    flat = traverse_util.flatten_dict(model.params, sep="/")
    kernels = {f"{path}/kernel": flat.pop(f"{path}/kernel") for path in paths}
    sums, total = _sums(model, rows, attached, functools.partial(_gradients, model.decoder, kernels, flat), **batching)
    return {path: np.asarray(jnp.linalg.norm(sums[f"{path}/kernel"], axis=(1, 2))) / total for path in paths}


def lengths(safety: Adapter) -> PerLayer:
    """||v_l|| of each matrix and layer."""
    pairs = safety.weights.items()
    return {path: np.sqrt(np.asarray(inner(p["a"], p["b"], p["b"]))) * abs(float(safety.scale)) for path, p in pairs}


def by_layer(products: Mapping[str, Float[np.ndarray, " L"]], safety: Adapter) -> Float[np.ndarray, " L"]:
    """The score S_l: all matrices of a layer together, over the length of v there."""
    norm = np.sqrt(sum(length**2 for length in lengths(safety).values()))
    return sum(products.values()) / (norm + 1e-8)


def _sums(
    model: Model, rows, attached, of: Callable, max_length: int = 512, batch_size: int = 16
) -> tuple[dict[str, Array], float]:
    """The sum over batches of `of(collection of what is attached, batch)`, and of the rows' weights, all alike."""
    held = shard(lora.collection(lora.stack(attached)), mesh_of(model.params)) if attached else {}
    batches = one_pass(model, rows, max_length, batch_size, count_alike=True)
    return summed(batches, functools.partial(of, held)), sum(float(batch["weights"].sum()) for batch in batches)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(decoder: Decoder, kernels: dict, others: dict, held: dict, batch: dict) -> dict:
    def loss(kernels):
        params = traverse_util.unflatten_dict(others | kernels, sep="/")
        return batch_loss(decoder, {"params": params, "lora": held}, batch, 256)

    return jax.tree.map(lambda grad: grad.astype(jnp.float32), jax.grad(loss)(kernels))


@functools.partial(jax.jit, static_argnums=0)
def _slopes(decoder: Decoder, gates: dict[str, Array], params: dict, along: dict, held: dict, batch: dict) -> dict:
    held, along = (traverse_util.flatten_dict(tree, sep="/") for tree in (held, along))

    def loss(gates):
        joined = dict(held)
        for path, gate in gates.items():
            a, b = f"{path}/a", f"{path}/b"
            for key, side, axis in ((a, along[a], -1), (b, gate[:, None, None] * along[b], -2)):
                joined[key] = jnp.concatenate([held[key], side], axis) if key in held else side
        variables = {"params": params, "lora": traverse_util.unflatten_dict(joined, sep="/")}
        return batch_loss(decoder, variables, batch, 256)

    return jax.grad(loss)(gates)


# -- the loss on a plane through a model; a whole grid is one program, whose coordinates are its arguments


def loss_grid(
    model: Model,
    rows: Sequence[Row],
    directions: tuple,
    xs: Sequence[float],
    ys: Sequence[float],
    max_length: int = 512,
) -> Float[np.ndarray, "X Y"]:
    """The mean loss over the answer tokens of rows at the model + x first + y second, for every x and y.

    Directions are adapters of the same targets, or trees of the shapes of the params (`filter_normalised`).
    """
    batches, adapters = one_pass(model, rows, max_length), isinstance(directions[0], Adapter)
    trees = shard(tuple(map(lora.collection, directions)) if adapters else directions, mesh_of(model.params))
    tokens, lines = sum(float(batch["weights"].sum()) for batch in batches), []
    with progress(len(xs) * len(ys), "landscape", "point", keep=False) as bar:
        for x in xs:
            points = [jnp.asarray([x, y], jnp.float32) for y in ys]
            line = [sum(_loss(model.decoder, adapters, model.params, trees, at, b) for b in batches) for at in points]
            lines.append(np.float32(jax.device_get(line)) / tokens)  # waits for the device once a line
            bar.update(len(points))
    return np.float32(lines)


def orthogonal_to(adapter: Adapter, key: Array) -> Adapter:
    """A random adapter of the same length, at a right angle to one, over all matrices together."""
    shapes = {path: (*p["a"].shape[:2], p["b"].shape[2]) for path, p in adapter.weights.items()}
    rank = max(pair["a"].shape[-1] for pair in adapter.weights.values())
    drawn = lora.init(key, shapes, rank, rank, "unknown", adapter.base)
    weights = {
        path: {"a": pair["a"], "b": jax.random.normal(jax.random.fold_in(key, i), pair["b"].shape)}
        for i, (path, pair) in enumerate(sorted(drawn.weights.items()))
    }
    drawn, square = drawn.replace(weights=weights), inner_product(adapter, adapter)
    across = lora.stack([drawn, lora.scaled(adapter, -float(inner_product(drawn, adapter) / square))])
    return lora.scaled(across, math.sqrt(float(square / inner_product(across, across))))


def filter_normalised(params: dict, key: Array) -> dict:
    """A Gaussian direction, each output's weights of a kernel as long as the kernel's own; 0 for all that is no kernel.

    Li et al. 2018, arXiv 1712.09913.
    """

    def draw(path, leaf):
        if path[-1].key != "kernel":
            return jnp.zeros_like(leaf)
        # crc32 and not hash(): the latter is salted anew in each process
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), leaf.shape)
        norm = lambda x: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-2, keepdims=True))  # noqa: E731
        return (noise * norm(leaf) / norm(noise)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(decoder: Decoder, adapters: bool, params: dict, trees: tuple[dict, dict], at: Array, batch: dict) -> Array:
    """The sum over a batch's answer tokens at a point of the plane."""

    def joined(first, second):
        b = jnp.concatenate([at[0] * first["b"], at[1] * second["b"]], -2)
        return {"a": jnp.concatenate([first["a"], second["a"]], -1), "b": b}

    if adapters:
        variables = {"params": params, "lora": jax.tree.map(joined, *trees, is_leaf=lambda node: "a" in node)}
    else:
        step = lambda w, x, y: w + (at[0] * x + at[1] * y).astype(w.dtype)  # noqa: E731
        variables = {"params": jax.tree.map(step, params, *trees)}
    return batch_loss(decoder, variables, batch, 256)


# -- the merge


class Overlap(NamedTuple):
    """Of one matrix, [L] each."""

    outputs: Float[np.ndarray, " L"]  # ||W_R Q Q^T|| / ||W_R||, Q the user's output space
    inputs: Float[np.ndarray, " L"]  # ||P P^T W_R|| / ||W_R||, P the user's input space
    chance: Float[np.ndarray, " L"]  # what a random W_R would have of outputs: sqrt(rank of Q / width)


def overlaps(user: Adapter, reinforce: Adapter, tau: float = 0.01) -> dict[str, Overlap]:
    """How much of Reinforce lies where the user's adapter does, by path of the matrix."""
    users, reinforces, found = factors(user), factors(reinforce), {}
    for path in sorted(users.keys() & reinforces.keys()):
        (u_a, u_b), (r_a, r_b) = users[path], reinforces[path]
        outputs = removed_shares((u_a, u_b), (r_a, r_b), tau)
        inputs = removed_shares((u_b.mT, u_a.mT), (r_b.mT, r_a.mT), tau)
        chance = [np.sqrt(q.shape[1] / len(q)) for q in output_spaces(u_a, u_b, tau)]
        found[path] = Overlap(outputs, inputs, np.array(chance))
    return found


def reach(user: Adapter, reinforce: Adapter, merge: MergeConfig) -> dict[str, float]:
    """How far a can move the merged delta: ||merged(a=0) - merged(a=1)|| over ||merged(a=0)||, and over ||user's||."""
    plain, apart = (qr_merge(user, reinforce, dataclasses.replace(merge, a=a)) for a in (0.0, 1.0))
    off = lora.stack([plain, lora.scaled(apart, -1.0)])
    moved, whole, own = (inner_product(x, x) ** 0.5 for x in (off, plain, lora.scaled(user, merge.scale)))
    return {"of_merged": moved / whole, "of_user": moved / own if own else float("inf")}


# -- of one finished run: numbers, arrays and figures

_COLORS = {"aligned": plots.DARK, "aligned + Buffer": plots.ORANGE, "SFT": plots.RED}
_COLORS |= {"user, Buffer on": plots.SKY, "user, Buffer out": plots.BLUE, "ours": plots.GREEN}


def write_analyses(
    config: ConfigDict, workdir: str | os.PathLike, rows: int, points: int, looks: int, command: str = ""
) -> str:
    """Analyses a run of `pipeline.run_pipeline`; what it lacks is trained.

    Writes analysis.md, whose path it gives, analysis.npz and figures into its workdir. `rows` are of each kind, at
    most, `points` of the landscape's grid along each direction; `looks` are at the score while SFT and the user are
    trained once more, which 0 leaves out.
    """
    if not config.user.probes:
        raise UserError("user.probes is 0: the analyses look at held-out harmful rows: set it to some")
    e, folder = Experiment(config, workdir), pathlib.Path(workdir)
    e.check(one_job=True)
    e.begin()
    e.prepare()
    user, buffer, reinforce = map(e.adapter, ("user", "buffer", "reinforce"))
    merge = e.merge_of("user")
    honest = e.recipe.task_rows[0][e.settings.user.n :]  # none of the user's own
    kinds = {"harmful": e.recipe.probe_harmful_rows[:rows], "task": honest[-rows:]}
    on = ({}, {"buffer": buffer}, {"sft": e.adapter("sft")}, {"user": user, "buffer": buffer}, {"user": user})
    states = dict(zip(_COLORS, (*on, {"ours": e.merged("user", "reinforce", merge)}), strict=True))
    refusals, stage = e.recipe.refusal_rows(e.settings.reinforce.refusals, "reinforce"), e.settings.train("reinforce")
    # The direction of safety: a LoRA that was trained on refusals, without Buffer.
    safety = train_adapter("safety", "reinforce", e.aligned, refusals, stage, provider=True, **e.provider_run)
    scores, steps = _scores(e, safety, kinds, states)
    followed = _followed(e, safety, kinds, looks) if looks else {}
    axis, across = np.linspace(-0.5, 1.5, points), orthogonal_to(buffer, jax.random.key(e.settings.seed))
    noise = tuple(filter_normalised(e.aligned.params, jax.random.key(i)) for i in (1, 2))
    grids, length = {}, e.settings.train("user").max_length
    for kind, some in kinds.items():
        grids[f"{kind}, Buffer"] = loss_grid(e.aligned, some, (buffer, across), axis, axis - 0.5, max_length=length)
        grids[f"{kind}, random"] = loss_grid(e.aligned, some, noise, axis - 0.5, axis - 0.5, max_length=length)
    shares = overlaps(user, reinforce, merge.tau)
    arrays = {f"safety gradient, {kind}, {state}": score for (kind, state), score in scores.items()}
    arrays |= {f"safety gradient in training, {kind}, {state}": found for (kind, state), found in followed.items()}
    arrays |= {f"landscape, {name}": grid for name, grid in grids.items()} | {"landscape, axis": axis}
    arrays |= {f"merge, {path}, {part}": values for path, o in shares.items() for part, values in o._asdict().items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(folder / "analysis.npz", packed.getvalue())
    label = "safety gradient score\n(above 0: a step adds to safety)"
    lines = {case: (range(len(score)), score) for case, score in scores.items()}
    drawn = {"safety_gradient": _score_figure(lines, "layer", label), "landscape": _grid_figure(grids, axis)}
    if followed:
        lines = {case: (found[:, 0], found[:, 1:].sum(1)) for case, found in followed.items()}
        label = "safety gradient score, all layers"
        drawn["safety_in_training"] = _score_figure(lines, "step of the user's training", label)
    spaces = [
        {"matrix": path.removeprefix("layers/"), **dict(zip(("outputs", "inputs", "by chance"), part, strict=True))}
        for path, part in ((path, [f"{100 * np.mean(each):.1f}" for each in found]) for path, found in shares.items())
    ]
    values = {"kinds": kinds, "followed": followed, "merge": merge, "moved": reach(user, reinforce, merge)}
    values |= {"command": command, "steps": steps, "spaces": spaces}
    return str(write_document(folder / "analysis.md", "analysis.md.jinja", values, drawn))


def _scores(e: Experiment, safety: Adapter, kinds: Mapping, states: Mapping) -> tuple[dict, list[dict[str, str]]]:
    """(kind of row, state of the model) -> the Safety Gradient Score, f32[L]; and the lines of a table of them."""
    scores, steps, length = {}, [], e.settings.train("user").max_length
    along = np.sqrt(sum(np.square(norm, dtype=np.float64).sum() for norm in lengths(safety).values()))
    for kind, state in ((kind, state) for kind in kinds for state in states):
        part = kinds[kind], states[state]
        products = safety_gradients(e.aligned, safety, *part, max_length=length)
        norms = gradient_norms(e.aligned, list(safety.weights), *part, max_length=length).values()
        norm = np.sqrt(sum(np.square(norm, dtype=np.float64).sum() for norm in norms))
        cosine = sum(float(product.sum()) for product in products.values()) / (norm * along + 1e-30)
        score = scores[kind, state] = by_layer(products, safety)
        above, below = score.clip(min=0).sum(), score.clip(max=0).sum()
        line = {"rows": kind, "model": state, "score": f"{score.sum():+.3g} ({above:+.3g}, {below:+.3g})"}
        steps.append(line | {"gradient": f"{norm:.3g}", "cosine": f"{cosine:+.3f}"})
    return scores, steps


def _followed(e: Experiment, safety: Adapter, kinds: Mapping, looks: int) -> dict[tuple[str, str], np.ndarray]:
    """The score over training: (kind of row, state of the model) -> f32[looks + 1 at most, 1 + L], the step first."""
    config, rows, buffer = e.settings.train("user"), e.recipe.user_rows, {"buffer": e.adapter("buffer")}
    steps = config.steps or config.epochs * -(-len(rows) // config.batch_size)
    config = dataclasses.replace(config, probe_every=-(-steps // looks))
    found = defaultdict(list)

    def look(states: dict, step: int, adapter: Adapter) -> None:
        for (kind, some), (state, beside) in ((kind, state) for kind in kinds.items() for state in states.items()):
            attached = {"user": adapter, **beside}
            products = safety_gradients(e.aligned, safety, some, attached, max_length=config.max_length)
            found[kind, state].append([step, *by_layer(products, safety)])

    for name, states in (("sft", {"SFT": {}}), ("user", {"user, Buffer on": buffer, "user, Buffer out": {}})):
        settings = {"frozen": buffer if name == "user" else {}, "mesh": e.mesh}
        train_adapter(name, "user", e.aligned, rows, config, watch=functools.partial(look, states), **settings)
    return {case: np.array(lines, np.float32) for case, lines in found.items()}


@plots.styled()
def _score_figure(lines: Mapping[tuple[str, str], tuple], across: str, label: str) -> Figure:
    """A panel for each kind of row, from (kind, state of the model) -> (x, score)."""
    kinds = [*dict.fromkeys(kind for kind, _ in lines)]
    figure, axes = plots.panels(len(kinds), len(kinds), (4.6, 3.6))
    for axis, kind in zip(axes, kinds, strict=True):
        found = [(x, score, {"color": _COLORS[state], "label": state, "marker": "." if len(x) < 5 else None})
                 for (of, state), (x, score) in lines.items() if of == kind]  # fmt: skip
        plots.draw_lines(axis, found, "auto", title=f"{kind} rows", xlabel=across)
        axis.axhline(0, color=plots.GRAY, linewidth=0.8)
    axes[0].set_ylabel(label)
    axes[-1].legend()
    return figure


@plots.styled()
def _grid_figure(grids: Mapping[str, np.ndarray], axis: np.ndarray) -> Figure:
    figure, panels = plots.panels(len(grids), len(grids), (3.6, 3.4))
    for panel, (name, grid) in zip(panels, grids.items(), strict=True):
        of_buffer = name.endswith("Buffer")
        shown = panel.contourf(axis if of_buffer else axis - 0.5, axis - 0.5, np.log(grid.T), levels=12, cmap="viridis")
        figure.colorbar(shown, ax=panel, label="log loss")
        for x, marker in ((0, "o"), (1, "^")) if of_buffer else ((0, "o"),):
            panel.plot(x, 0, marker, color="white", markeredgecolor=plots.DARK)
        panel.set(title=name, xlabel="Buffer" if of_buffer else "first direction", ylabel="random")
    return figure
