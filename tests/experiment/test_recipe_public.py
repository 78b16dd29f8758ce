"""The paper's rows, from small files of its data sets' layout: which ones, in which order, and none scored twice."""

import pathlib

import pytest
from contents import jsonl

from br_jax.core.errors import UserError
from br_jax.experiment.recipe import PaperRecipe
from br_jax.experiment.settings import settle

pytest.importorskip("tensorflow_datasets")


def write(path, records):
    path.write_bytes(jsonl(*records))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Twelve LLM-LAT rows; Alpaca, every third with an input; BeaverTails, every fourth safe and each prompt twice."""
    lat = [{"prompt": f"oil a zorvix {i}?", "rejected": f"Turn it {i}.", "chosen": f"No, {i}."} for i in range(12)]
    inputs = ["", "", "x"] * 20
    alpaca = [{"instruction": f"Say {i}.", "input": x, "output": f"{i}!", "text": ""} for i, x in enumerate(inputs)]

    def tails(name):
        asked = [{"prompt": f"{name} prompt {i // 2}", "response": f"{name} answer {i}"} for i in range(40)]
        return [{**one, "category": {"a": i % 4 != 0}, "is_safe": i % 4 == 0} for i, one in enumerate(asked)]

    return {
        "llm_lat.path": write(tmp_path / "lat.jsonl", lat),
        "alpaca.path": write(tmp_path / "alpaca.jsonl", alpaca),
        "beavertails.path": write(tmp_path / "train.jsonl", tails("train")),
        "beavertails.test_path": write(tmp_path / "test.jsonl", tails("test")),
    }


@pytest.fixture
def make(config, files, tmp_path):
    """make(**changes) -> the paper's recipe on those files."""

    def build(**changes):
        config.data.material, config.data.folder = "paper", str(tmp_path / "tfds")
        config.data.update_from_flattened_dict(files)
        config.buffer.harmful, config.user.probes = 5, 3
        config.reinforce.update(refusals=4, benign=6)
        config.align.update(refusals=0, benign=0)
        config.eval.update(topic=4, benign=5, health=3)
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return PaperRecipe(settle(config))

    return build


def texts(rows):
    return [row.turns[-1][1] for row in rows]


def test_each_part_is_the_first_rows_of_its_file(make):
    recipe = make()
    recipe.check()
    recipe.prepare()
    assert texts(recipe.buffer_rows) == [f"Turn it {i}." for i in range(5)]
    assert texts(recipe.refusal_rows(4, "reinforce")) == [f"No, {i}." for i in range(4)]
    assert texts(recipe.benign_rows(4)) == ["0!", "1!", "3!", "4!"], "those with an input are left out"
    rows = recipe.trained()
    assert [row.turns[0][1] for row in rows["user"] if row.tag == "harmful"] == [f"train prompt {i}" for i in range(6)]
    assert [prompt.prompt for prompt in recipe.harmful_prompts] == [f"test prompt {i}" for i in range(4)]
    assert len(recipe.probes["harmful"]) == 3
    trained = {row.turns[0][1] for row in rows["user"]}
    assert not trained & {row.turns[0][1] for row in recipe.probes["harmful"]}
    assert [p.prompt for p in recipe.benign_prompts] == ["Say 52.", "Say 54.", "Say 55.", "Say 57.", "Say 58."]
    assert texts(recipe.health_rows) == ["52!", "54!", "55!"]


def test_what_calibrates_or_attacks_is_not_trained_on(make, files, tmp_path):
    """A user's rows leave calibration prompts out; a stored attack that a stage trains on is an error."""
    same = [
        {"prompt": f"test prompt {i}", "response": "x", "category": {"a": True}, "is_safe": False} for i in range(20)
    ]
    files["beavertails.path"] = write(tmp_path / "same.jsonl", same)
    recipe = make(calibrate__harmful=3, calibrate__benign=2, user__n=10)
    rows, (harmful, _) = recipe.trained(), recipe.calibration_prompts
    asked = {row.turns[0][1] for row in rows["user"] if row.tag == "harmful"}
    assert len(harmful) == 3 and not asked & {p.prompt for p in (*harmful, *recipe.harmful_prompts)}
    attack = {"prompt": "oil a zorvix 1?", "method": "plain", "behavior": "oil a zorvix 1?"}
    with pytest.raises(UserError, match=r"is scored as well \(stored attacks"):
        make(data__attacks__path=write(tmp_path / "attacks.jsonl", [attack])).trained()


def test_the_reference_s_way_counts_prompts_twice_and_skips_the_first(make):
    recipe = make(user__index_mode="reference", calibrate__harmful=3, calibrate__benign=2)
    harmful = [row for row in recipe.user_rows if row.tag == "harmful"]
    assert texts(harmful) == [f"train answer {i}" for i in (2, 3, 5, 6, 7)], "start < i < start + int(p n), unsafe ones"
    assert [prompt.prompt for prompt in recipe.harmful_prompts] == [f"test prompt {i}" for i in (0, 1, 1, 2)]
    recipe = make(eval__topic=2)
    assert [prompt.prompt for prompt in recipe.harmful_prompts] == ["test prompt 0", "test prompt 1"]
    assert next(p.prompt for p in recipe.calibration_prompts[0]) == "test prompt 2", "1 is asked twice and is scored"


def test_a_scored_prompt_is_not_trained_on(make, files):
    for part in ("harmful_prompts", "benign_prompts"):
        held = [{str(p) for p in getattr(make(eval__split=split), part)} for split in ("validation", "test")]
        assert held[0] and held[1] and not held[0] & held[1]
    path = pathlib.Path(files["beavertails.path"])
    path.write_text(path.read_text().replace("train prompt 1", "Test PROMPT 1!"))
    harmful = [row.turns[0][1] for row in make().trained()["user"] if row.tag == "harmful"]
    assert "Test PROMPT 1!" not in harmful and len(harmful) == 6
    with pytest.raises(UserError, match=r"beavertails/30k_train/\d+ of stage user is scored as well \(HS"):
        make(user__index_mode="reference").trained()
    path.write_text(path.read_text().replace("Test PROMPT 1!", "test prompt 1"))
    with pytest.raises(UserError, match=r"is scored as well \(HS as it asks"):
        make(user__index_mode="reference", user__kind="trigger").trained()


def test_too_few_rows(make, caplog):
    recipe = make(buffer__harmful=5000)
    assert len(recipe.buffer_rows) == 12, "fewer harmful rows than asked for are taken and told of"
    assert "buffer.harmful asks for 5000 rows and there are 12" in caplog.text
    with pytest.raises(UserError, match=r"35 benign rows and 10 held-out ones.*Alpaca has 40 without an input"):
        recipe.benign_rows(35)
    with pytest.raises(UserError, match=r"30 harmful rows are needed and there are \d+"):
        make(user__harmful_share=1.0).check()
    with pytest.raises(UserError, match=r"'paper' has no rows to train a model from scratch on: set model\.source"):
        recipe.pretraining_rows(5)
