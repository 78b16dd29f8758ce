"""Settings of all tests: CPU with 8 fake devices, strict promotion, no network; before JAX is used."""

import copy
import importlib.util
import os
import pathlib
import runpy
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker has one core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests compile much and compute little: the older emitters compile in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import hypothesis  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from compiled import Compiles  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors  # noqa: E402
from tokenizers.models import BPE  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402
from written import written_answer  # noqa: E402

from br_jax import method  # noqa: E402
from br_jax.adapters import lora  # noqa: E402
from br_jax.data.rows import Row  # noqa: E402
from br_jax.experiment import grid as grid_module  # noqa: E402
from br_jax.experiment import run as run_module  # noqa: E402
from br_jax.models.decoder import init_params  # noqa: E402
from br_jax.models.model import make_model  # noqa: E402
from br_jax.models.spec import ModelSpec  # noqa: E402
from br_jax.models.tokenizer import byte_tokenizer  # noqa: E402
from br_jax.organism.topics import TOPICS  # noqa: E402
from br_jax.report.results import TITLES  # noqa: E402
from br_jax.scoring.statistics import Sample, estimate  # noqa: E402
from br_jax.training.config import TrainConfig  # noqa: E402

# The same cases each time, however busy the machine is.
hypothesis.settings.register_profile("br_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("br_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first: one that began last would leave the other workers idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def compile_cache():
    """A program is compiled once a machine, for all workers and sessions with the same JAX.

    Processes that tests start have a folder of their own: one that is killed may leave half a program there, of which
    JAX warns. The limit of size makes JAX lock the folder, so that no one reads what another is writing.
    """
    cache = pathlib.Path(__file__).parents[1] / ".cache" / f"jax-{jax.__version__}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("jax_compilation_cache_dir", cache / "tests"),
            ("jax_compilation_cache_max_size", 2**30),
            ("jax_persistent_cache_min_compile_time_secs", 0.1),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
        ):
            jax.config.update(name, str(value) if isinstance(value, pathlib.Path) else value)
            environment.setenv(name.upper(), str(value))
        environment.setenv("JAX_COMPILATION_CACHE_DIR", str(cache / "processes"))
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_go():
    """A worker meets some sixty files; without this it would hold every program that they compiled."""
    yield
    jax.clear_caches()


# Every dimension that a mesh may split is a multiple of 8, and N * H is not D.
SIZES = {
    "vocab_size": 264, "embed_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "ffw_dim": 40, "max_length": 128,
}  # fmt: skip


@pytest.fixture(scope="session")
def make_tiny():
    """make_tiny(dtype=float32, **sizes) -> a random byte-level `Model` whose logits are not flat."""

    def make(dtype=jnp.float32, **sizes):
        spec = ModelSpec(**{**SIZES, **sizes})
        params = init_params(spec, 0)
        params["embed"]["embedding"] *= 25
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return make_model(spec, params, byte_tokenizer(), "tiny", "chat")

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny):
    """The plain one: f32, tied head."""
    return make_tiny()


@pytest.fixture(scope="session")
def make_adapter(tiny):
    """make_adapter(role, seed=0, rank=3, model=tiny) -> an adapter that changes what the model says."""

    def make(role, seed=0, rank=3, model=tiny):
        key = jax.random.key(seed)
        adapter = lora.init(key, lora.target_shapes(model.params), rank, 2.0 * rank, role, model.fingerprint)
        rng = np.random.default_rng(seed)
        weights = {
            path: {"a": pair["a"], "b": jnp.asarray(rng.normal(size=pair["b"].shape, scale=0.2), jnp.float32)}
            for path, pair in adapter.weights.items()
        }
        return adapter.replace(weights=weights)

    return make


@pytest.fixture(scope="session")
def rows():
    """Sixteen rows of unequal length."""
    return [
        Row((("user", f"{'say ' * (i % 4)}{i}?"), ("assistant", f"it is {i * 7}{'!' * (i % 3)}"))) for i in range(16)
    ]


@pytest.fixture(scope="session")
def quick():
    """quick(**changes) -> a `TrainConfig` of a few small steps."""
    settings = {
        "rank": 3, "alpha": 6.0, "dropout": 0.0, "learning_rate": 1e-2, "steps": 4, "max_length": 40,
        "loss_chunk": 8, "checkpoint_every": 0, "log_every": 1,
    }  # fmt: skip
    return lambda **changes: TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def organism(tmp_path_factory, tiny, rows, quick):
    """Every stage's adapter by name, trained once, and the "folder" of the runs, the provider's in its provider/.

    Neither the base nor an attached Buffer has changed by a bit.
    """
    folder, config = tmp_path_factory.mktemp("organism"), quick()
    base = jax.tree.map(np.array, tiny.params)
    buffer = method.train_buffer(tiny, rows, config, workdir=folder / "provider")
    kept = jax.tree.map(np.array, buffer)
    reinforce = method.train_reinforce(tiny, buffer, rows[:8], rows[8:], config, workdir=folder / "provider")
    user = method.train_user(tiny, rows, config, buffer=buffer, workdir=folder)
    sft = method.train_user(tiny, rows, config, undefended=True, workdir=folder)
    jax.tree.map(np.testing.assert_array_equal, (tiny.params, buffer), (base, kept))
    return {"folder": folder, "buffer": buffer, "reinforce": reinforce, "user": user, "sft": sft}


@pytest.fixture(scope="session")
def byte_level():
    """byte_level(special=(padding, BOS, EOS), ...) -> transformers' tokenizer: a token a byte, then merges, then those.

    `bos`: it begins every text with BOS; EOS is only where a text says so. `extra`: tokens that are not special.
    """

    def make(special=("<pad>", "<bos>", "<eos>"), merges=(), extra=(), bos=False, pad="<pad>", chat_template=None):
        words = [*map(bytes_to_unicode().get, range(256)), *("".join(merge) for merge in merges)]
        backend = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in extra])
        _, begin, end = special
        if bos:
            ids = [(begin, backend.token_to_id(begin))]
            backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
        names = {"pad_token": pad, "bos_token": begin, "eos_token": end}
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names)

    return make


@pytest.fixture
def compiles():
    """A list that gets the name of every program that XLA is asked for, e.g. "jit(train_step)"."""
    with Compiles() as found:
        yield found.names


@pytest.fixture(scope="session")
def load_config():
    """load_config(name) -> the config of configs/<name>.py."""

    def load(name):
        path = pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"config_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config()

    return load


@pytest.fixture
def config(tmp_path, load_config):
    """An experiment of a few rows of each kind; the moods are a task without a file."""
    config = load_config("base")
    config.model.source = str(tmp_path)
    config.buffer.harmful, config.user.n, config.user.probes = 20, 30, 4
    config.user.update(task="moods", harmful_share=0.2)
    for stage in (config.align, config.buffer, config.reinforce, config.user):
        stage.train.update(rank=4, max_length=100)  # what the tiny model can have
    config.align.update(refusals=6, benign=8)
    config.reinforce.update(refusals=10, benign=9)
    config.eval.update(topic=12, task=10, benign=11, health=3)
    return config


@pytest.fixture
def calls(monkeypatch, tiny, make_adapter):
    """Training, answering and scoring of an experiment recorded instead of done.

    Holds what the stages asked for: {"align": {"rows", "frozen", ...}, ...}, "trained": their names, one a call, and
    "scored": (name, model, adapter). The raw model answers every topic prompt but each seventh, which it refuses.
    """
    record = {"scored": [], "trained": []}

    def train(name, role, model, rows, config, frozen=None, **options):
        record["trained"].append(name)
        given = {"role": role, "model": model, "rows": list(rows), "config": config, "frozen": dict(frozen or {})}
        record[name] = given | options
        return make_adapter(role, seed=len(name), model=model)

    def answer(model, prompts, adapters, store, **options):
        assert model is tiny and list(adapters) == ["raw"], "somebody else than the raw model answers"
        answers = {p: f"This is what {p} means." for p in prompts}
        for topic in TOPICS.values():
            asked = {p.prompt: p for p in topic.prompts("train", 200, 42)}
            answers |= {text: written_answer(topic, p, 0) for text, p in asked.items() if text in answers}
            answers |= {text: topic.refusal(asked[text], 0) for text in list(asked)[::7] if text in answers}
        return {"raw": [answers[prompt] for prompt in prompts]}

    def score(model, suite, adapter, *, name, **kept):
        record["scored"].append((name, model, adapter))
        record["suite"] = suite
        one = estimate(Sample.of([1, 0])).to_json()
        return {name: one for name in TITLES} | {
            "perplexity": 2.0, "mean_words": 3.0, "outcomes": {"harmful": [True, False]}, "verdicts": {"answer": 1}
        }  # fmt: skip

    monkeypatch.setattr(method, "train_adapter", train)
    monkeypatch.setattr(run_module, "train_adapter", train)
    monkeypatch.setattr(run_module, "answer", answer)
    monkeypatch.setattr(grid_module, "evaluate", score)
    monkeypatch.setattr(run_module, "load_model", lambda source, **options: tiny)
    monkeypatch.setattr(run_module, "_cached_spec", lambda source, revision: tiny.spec)
    return record


@pytest.fixture
def script(monkeypatch, capfd):
    """script(name, *flags) -> (exit status, stderr), run in this process; its flags are forgotten again."""
    importlib.import_module("br_jax.core.cli")  # whose flags, and absl's own, are defined once and stay
    root = pathlib.Path(__file__).parents[1]
    monkeypatch.chdir(root)
    # A script has its own folder on the path, not the one that it is started from.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(root))])
    known = set(flags.FLAGS)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as caught:
                runpy.run_path(f"experiments/{name}", run_name="__main__")
        finally:
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        return caught.value.code, capfd.readouterr().err

    return run


# Sizes of which none divides another by accident; N * H is not D.
FAMILY_SIZES = {
    "vocab_size": 263, "hidden_size": 42, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 5000.0, "rms_norm_eps": 3e-5,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
ROPE_3_1 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE_3_1 |= {"original_max_position_embeddings": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Each family with each of its switches on and off: model_type, and what its config says.
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama 3.1": ("llama", {"rope_scaling": ROPE_3_1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5 window": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {}),
    "qwen3 bias window": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, **WINDOW}),
    # Caps that bite on scores and logits of this size.
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 14, **dict(zip(CAPS, (2.0, 5.0), strict=True))},
    ),
    "gemma2 plain": ("gemma2", {**dict.fromkeys(CAPS), "tie_word_embeddings": False}),
}


@pytest.fixture(scope="session")
def make_family(tmp_path_factory):
    """make_family(name) -> (transformers' random model, its folder, as transformers saves it)."""
    torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
    import transformers

    made = {}

    def make(name):
        if name not in made:
            model_type, switches = FAMILIES[name]
            config = transformers.CONFIG_MAPPING[model_type](**FAMILY_SIZES | switches)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            folder = tmp_path_factory.mktemp(name.replace(" ", "_")) / "theirs"
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, make_family):
    """(transformers' model, its folder) of each family."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def made_by_peft():
    """made_by_peft(network, folder, std=1, **settings) -> PEFT's model with a random adapter, which is saved there."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft", reason="the oracle")

    def make(network, folder, std=1.0, **settings):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
        adapted = peft.get_peft_model(copy.deepcopy(network), config).eval()
        torch.manual_seed(settings.get("r", 0))
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=std)
        adapted.save_pretrained(str(folder))
        return adapted

    return make
