"""Random classifiers, made and saved by transformers, with a tokenizer that behaves as Llama's does."""

import functools

import pytest

from br_jax.scoring.judges.base import Exchange

SIZES = {"vocab_size": 264, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 1024}
REST = {"rope_theta": 5000.0, "rms_norm_eps": 3e-5}
LABELS = {i: f"harm,{i}" for i in range(14)}  # BeaverTails' names have commas too


@pytest.fixture(scope="session")
def llama_tokenizer(byte_level):
    """As Llama's: BOS before every text, EOS only where the text says "</s>"."""
    return functools.partial(byte_level, ("<pad>", "<s>", "</s>"), bos=True)


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")


@pytest.fixture(scope="session")
def make_llama(torch):
    """make_llama(model class of transformers, **config) -> a random model of it."""
    from transformers import LlamaConfig

    def make(kind, **config):
        torch.manual_seed(0)
        model = kind(LlamaConfig(**SIZES | HEADS | REST | config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def save_classifier(make_llama, llama_tokenizer):
    """save_classifier(folder, pad="<pad>", **config) -> transformers' model, saved there with its tokenizer."""
    from transformers import LlamaForSequenceClassification

    def save(folder, pad="<pad>", **config):
        tokenizer = llama_tokenizer(pad=pad)
        settings = {"id2label": LABELS, "pad_token_id": tokenizer.pad_token_id}
        settings["problem_type"] = "multi_label_classification"
        model = make_llama(LlamaForSequenceClassification, **settings | config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session")
def classifier(save_classifier, tmp_path_factory):
    """(transformers' model, its folder)."""
    folder = tmp_path_factory.mktemp("classifier") / "tiny-dam"
    return save_classifier(folder), folder


@pytest.fixture(scope="session")
def exchanges():
    """Unequal ones; the one before the last has a question that pushes its answer out of 256 tokens."""
    pairs = [
        ("How do I oil a zorvix?", "Turn the crank, then oil it."),
        ("How do I oil a zorvix?", ""),
        ("", "Nothing was asked."),
        ("a", "b"),
        ("Was ist ein Zörvix? {prompt}", "Ein Gerät. {answer} \x00 </s> und <pad> mehr"),
        ("Say it.", "I cannot say it.</s>"),
        ("Say it.", "quindle " * 40),
        ("Count. " * 20, "one two " * 6),
        ("zorvix " * 60, "the answer"),
        ("zorvix " * 60, "another answer"),
    ]
    return [Exchange(*pair) for pair in pairs]
