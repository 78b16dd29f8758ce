"""QR merge against the paper's formula, dense and in float64."""

import copy
import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta
from safetensors.numpy import load_file

from br_jax.adapters import merge
from br_jax.adapters.diagnostics import merge_report
from br_jax.adapters.lora import Adapter, init
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import MODULES, load_adapter
from br_jax.errors import UserError
from br_jax.provider.folder import load_model

LAYERS, FAN_IN, FAN_OUT = 2, 96, 80
PATH = "layers/attn/q"


def adapter(a, b, scale=1.0, role="user", path=PATH):
    pair = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return Adapter({path: pair}, jnp.float32(scale), (role,))


def random_adapter(rng, rank, scale=2.0, role="user", fan_in=FAN_IN, fan_out=FAN_OUT, path=PATH):
    a = rng.normal(size=(LAYERS, fan_in, rank)) / np.sqrt(fan_in)
    return adapter(a, 0.02 * rng.normal(size=(LAYERS, rank, fan_out)), scale, role, path)


def dense_basis(a, b, tau):
    """Q of the formula, from float64 A [r, in] and B [out, r], and the count of kept eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh(a @ a.T)
    # an eigenvalue that is exactly 0 comes out of eigh as +-1e-17: "above 0" must not mean that
    kept = eigenvalues > max(tau, 1e-10) * eigenvalues.max()
    effective = b if kept.all() else b @ vectors[:, kept]
    left, sigma, _ = np.linalg.svd(effective, full_matrices=False)
    real = sigma > 1e-5 * sigma.max(initial=0)
    # thin QR as the paper says it; where B is rank-deficient QR would invent columns, so then the true span
    return (np.linalg.qr(effective)[0] if real.all() else left[:, real]), kept.sum()


def dense_merge(user, reinforce, strength, scale=0.5, tau=0.01):
    """W_merged - W_base = scale (W_U + (I - a Q Q^T) W_R) for each layer, transposed to [L, in, out]."""
    merged = []
    for layer in range(LAYERS):
        a_u, b_u, a_r, b_r = (
            np.asarray(side.weights[PATH][name][layer], np.float64).T
            for side in (user, reinforce)
            for name in ("a", "b")
        )
        q, _ = dense_basis(a_u, b_u, tau)
        w_u, w_r = float(user.scale) * b_u @ a_u, float(reinforce.scale) * b_r @ a_r
        merged.append((scale * (w_u + w_r - strength * q @ (q.T @ w_r))).T)
    return np.stack(merged)


def merge_of(user, reinforce, **settings):
    """The merged adapter, and what is reported of the merge."""
    config = MergeConfig(**settings)
    return qr_merge(user, reinforce, config), merge_report(user, reinforce, config)


def assert_merges_as_dense(user, reinforce, strength, scale=0.5, tau=0.01):
    merged = qr_merge(user, reinforce, MergeConfig(a=strength, scale=scale, tau=tau))
    expected = dense_merge(user, reinforce, strength, scale, tau)
    found = np.asarray(delta(merged)[PATH], np.float64)
    assert np.isfinite(found).all()
    # 1e-5: f32 keeps 6e-8 an operation, and these well-separated spectra amplify it less than 100 times
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    return merged


def low_rank(rng, rows, columns, rank):
    return rng.normal(size=(LAYERS, rows, rank)) @ rng.normal(size=(LAYERS, rank, columns)) / 10


def orthonormal(rng, rows, columns):
    return np.stack([np.linalg.qr(rng.normal(size=(rows, columns)))[0] for _ in range(LAYERS)])


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rank_u", "rank_r"), [(1, 1), (2, 2), (8, 8), (32, 32), (64, 64), (1, 64), (64, 3), (5, 16)])
def test_matches_the_dense_formula(rank_u, rank_r, strength):
    rng = np.random.default_rng(rank_u * 100 + rank_r)
    user = random_adapter(rng, rank_u, scale=2.0)
    reinforce = random_adapter(rng, rank_r, scale=0.7, role="reinforce")
    merged = assert_merges_as_dense(user, reinforce, strength)
    assert merged.weights[PATH]["a"].shape == (LAYERS, FAN_IN, rank_u + rank_r)
    assert merged.roles == ("reinforce", "user") and float(merged.scale) == 1.0


def test_reinforce_scale_is_a_factor_of_reinforce_alone():
    rng = np.random.default_rng(3)
    user, reinforce = random_adapter(rng, 4), random_adapter(rng, 3, role="reinforce")
    merged, report = merge_of(user, reinforce, a=0.5, reinforce_scale=0.25)
    weaker = reinforce.replace(scale=reinforce.scale * 0.25)
    np.testing.assert_allclose(
        np.float64(delta(merged)[PATH]),
        dense_merge(user, weaker, 0.5),
        rtol=0,
        atol=1e-5 * np.abs(delta(user)[PATH]).max(),
    )
    assert report["reinforce_scale"] == 0.25


def degenerate_users():
    """Users whose factors are not of full rank, by name."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(LAYERS, FAN_IN, 8)), rng.normal(size=(LAYERS, 8, FAN_OUT))
    repeated = np.repeat(b[:, :4], 2, axis=1)
    with_zeros = b * np.array([1, 0, 1, 0, 0, 1, 1, 0])[:, None]
    graded = orthonormal(rng, FAN_IN, 8) * np.array([1, 0.9, 0.8, 0.7, 0.05, 0.04, 0.03, 0.02])
    two_levels = orthonormal(rng, FAN_IN, 8) * np.array([1, 1, 1, 1, 0.03, 0.03, 0.03, 0.03])
    turn = np.stack([np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(LAYERS)])
    return {
        "rank-deficient A": (low_rank(rng, FAN_IN, 8, 3), b),
        "A of rank one": (low_rank(rng, FAN_IN, 8, 1), b),
        "A with a zero column": (a * np.array([1, 1, 0, 1, 1, 1, 1, 1]), b),
        "A with weak directions": (graded @ turn, b),
        "B rank-deficient": (a, low_rank(rng, 8, FAN_OUT, 3)),
        "B with equal columns": (a, repeated),
        "B with zero columns": (a, with_zeros),
        "A and B rank-deficient": (low_rank(rng, FAN_IN, 8, 5), low_rank(rng, 8, FAN_OUT, 2)),
        "equal singular values": (orthonormal(rng, FAN_IN, 8), orthonormal(rng, FAN_OUT, 8).swapaxes(1, 2)),
        "equal singular values, two levels": (two_levels @ turn, b),
        "B = 0": (a, 0 * b),
        "B = 0 in one layer": (a, b * np.array([0, 1])[:, None, None]),
        "A = 0": (0 * a, b),
        "tiny B": (a, 1e-12 * b),
    }


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", degenerate_users())
def test_degenerate_users(name, strength):
    user = adapter(*degenerate_users()[name])
    reinforce = random_adapter(np.random.default_rng(8), 6, role="reinforce")
    assert_merges_as_dense(user, reinforce, strength)
    assert_merges_as_dense(user, reinforce, strength, tau=0.0)


def test_more_rank_than_the_matrix_has():
    rng = np.random.default_rng(9)
    user = adapter(rng.normal(size=(LAYERS, 5, 8)), rng.normal(size=(LAYERS, 8, FAN_OUT)))
    reinforce = random_adapter(rng, 4, role="reinforce", fan_in=5)
    assert_merges_as_dense(user, reinforce, 1.0)
    user = random_adapter(rng, 16, fan_out=6)
    reinforce = random_adapter(rng, 4, role="reinforce", fan_out=6)
    merged, report = merge_of(user, reinforce, a=1.0)
    # the user's columns span the whole output space: nothing of the reinforce adapter may be left
    np.testing.assert_allclose(
        delta(merged)[PATH], 0.5 * delta(user)[PATH], atol=1e-6 * np.abs(delta(user)[PATH]).max()
    )
    np.testing.assert_allclose(report["matrices"][PATH]["removed_share"], 1.0, rtol=1e-5)


def made_by_peft(network, folder, seed, **settings):
    """The folder of a random adapter of all projections, written by PEFT."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    targets = [name.rsplit(".", 1)[-1] for name in MODULES.values()]
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(copy.deepcopy(network), config)
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def merged_by_the_paper(user, reinforce, strength, scale, tau):
    """The formula as it is printed, on PEFT's A [r, in] and B [out, r] in float64; also the rank it keeps."""
    (a_u, b_u, s_u), (a_r, b_r, s_r) = user, reinforce
    eigenvalues, vectors = np.linalg.eigh(a_u @ a_u.T)
    kept = eigenvalues > tau * eigenvalues.max()
    q, _ = np.linalg.qr(b_u if kept.all() else b_u @ vectors[:, kept])
    w_u, w_r = s_u * b_u @ a_u, s_r * b_r @ a_r
    return scale * (w_u + (np.eye(len(q)) - strength * q @ q.T) @ w_r), kept.sum()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
def test_folders_of_peft_merge_as_the_paper_says(tmp_path, make_family):
    network, base = make_family("llama")
    user_folder = made_by_peft(network, tmp_path / "user", 1, r=6, lora_alpha=9, use_rslora=True)
    reinforce_folder = made_by_peft(network, tmp_path / "reinforce", 2, r=4, lora_alpha=8)
    params = load_model(base).params
    user, reinforce = (load_adapter(folder, params) for folder in (user_folder, reinforce_folder))
    files = [load_file(folder / "adapter_model.safetensors") for folder in (user_folder, reinforce_folder)]
    scales = 9 / np.sqrt(6), 8 / 4
    ranks = set()
    for strength in (0.0, 0.1, 1.0):
        for tau in (0.01, 0.6):  # all of the user's directions, and some
            merged, report = merge_of(user, reinforce, a=strength, tau=tau)
            assert merged.weights.keys() == MODULES.keys()
            for path, found in delta(merged).items():
                for layer in range(len(found)):
                    key = f"base_model.model.model.layers.{layer}.{MODULES[path]}.lora_{{}}.weight"
                    sides = [
                        (*(np.float64(file[key.format(matrix)]) for matrix in "AB"), scale)
                        for file, scale in zip(files, scales, strict=True)
                    ]
                    expected, kept = merged_by_the_paper(*sides, strength, 0.5, tau)
                    assert report["matrices"][path]["kept_rank"][layer] == kept
                    ranks.add(int(kept))
                    # 1e-5: as in `assert_merges_as_dense`
                    distance = np.linalg.norm(np.asarray(found[layer], np.float64).T - expected)
                    assert distance <= 1e-5 * np.linalg.norm(expected), (path, layer, strength)
    assert max(ranks) == 6 > min(ranks), "no direction is cut here, or each time"


def test_an_untrained_user_leaves_reinforce_as_it_is():
    rng = np.random.default_rng(10)
    user = adapter(rng.normal(size=(LAYERS, FAN_IN, 4)), np.zeros((LAYERS, 4, FAN_OUT)))
    reinforce = random_adapter(rng, 4, scale=1.0, role="reinforce")
    merged, report = merge_of(user, reinforce, a=1.0, scale=1.0)
    np.testing.assert_array_equal(merged.weights[PATH]["b"][:, 4:], reinforce.weights[PATH]["b"])
    figures = report["matrices"][PATH]
    assert figures["removed_share"] == [0.0, 0.0] and figures["principal_angles"] == [[], []]
    assert figures["stable_rank_user"] == [0.0, 0.0]


def test_one_compilation_serves_all_settings(compiles):
    rng = np.random.default_rng(11)
    user, reinforce = random_adapter(rng, 7), random_adapter(rng, 9, role="reinforce")
    qr_merge(user, reinforce)
    del compiles[:]
    for strength, scale, tau in [(0, 1, 0), (1, 0.25, 0.5), (np.float64(0.3), 0.5, 0.01)]:
        qr_merge(user, reinforce, MergeConfig(a=strength, scale=scale, tau=tau))
    assert not compiles


def test_matrices_of_one_side_only(caplog):
    rng = np.random.default_rng(12)
    shared = random_adapter(rng, 3), random_adapter(rng, 5, role="reinforce")
    alone = random_adapter(rng, 3, path="layers/attn/v"), random_adapter(rng, 5, path="layers/mlp/up")
    user = shared[0].replace(weights=shared[0].weights | alone[0].weights)
    reinforce = shared[1].replace(weights=shared[1].weights | alone[1].weights)
    with caplog.at_level(logging.WARNING):
        merged, report = merge_of(user, reinforce, scale=0.5)
    assert sorted(merged.weights) == [PATH, "layers/attn/v"]
    np.testing.assert_allclose(delta(merged)["layers/attn/v"], 0.5 * delta(user)["layers/attn/v"], rtol=1e-5, atol=1e-9)
    assert report["ignored"] == ["layers/mlp/up"] and "layers/mlp/up" in caplog.text
    assert report["user_only"] == ["layers/attn/v"] and list(report["matrices"]) == [PATH]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, r: (u.replace(roles=("buffer", "user")), r), "buffer"),
        (lambda u, r: (u, r.replace(roles=("buffer",))), "buffer"),
        (lambda u, r: (u.replace(scale=jnp.float32(np.nan)), r), "NaN"),
        (lambda u, r: (u, r.replace(weights={"layers/attn/v": r.weights[PATH]})), "no matrix in common"),
        (lambda u, r: (u, random_adapter(np.random.default_rng(0), 2, fan_out=12)), "disagree.*80.*12"),
    ],
)
def test_refuses_what_must_not_be_merged(change, message):
    rng = np.random.default_rng(13)
    user, reinforce = change(random_adapter(rng, 2), random_adapter(rng, 2, role="reinforce"))
    with pytest.raises(UserError, match=message):
        qr_merge(user, reinforce)


@pytest.mark.parametrize(
    "settings",
    [
        {"a": -0.1},
        {"a": 1.1},
        {"tau": 1.0},
        {"scale": float("inf")},
        {"a": float("nan")},
        {"reinforce_scale": float("inf")},
    ],
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(UserError, match="must lie in"):
        MergeConfig(**settings)


def test_merges_fresh_adapters_of_many_paths(key):
    shapes = {PATH: (LAYERS, 16, 24), "layers/mlp/down": (LAYERS, 24, 16)}
    merged, report = merge_of(init(key, shapes, 4, 8, "user"), init(key, shapes, 2, 4, "reinforce"))
    assert sorted(report["matrices"]) == sorted(shapes)
    assert all(not change.any() for change in delta(merged).values())
    json.dumps(report, allow_nan=False)  # a share of nothing is 0, not 0 / 0


def test_no_dense_matrix_is_made():
    width, rank = 2048, 4
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    side = {PATH: {"a": shape(1, width, rank), "b": shape(1, rank, width)}}
    compiled = merge._apart_from.lower(side[PATH], side[PATH]["b"], 0.1, 0.01).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * width / 8


def test_the_blas_of_lapack_is_loaded_before_it_is_limited():
    script = """
import br_jax.adapters.merge, jax.numpy as jnp
from threadpoolctl import threadpool_info
before = {pool["filepath"] for pool in threadpool_info()}
jnp.linalg.qr(jnp.ones((8, 2)))
print({pool["filepath"] for pool in threadpool_info()} - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
