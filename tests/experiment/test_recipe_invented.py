"""Which rows go where: topics, shares, prefixes, and nothing scored that was trained on."""

import pytest
from written import written_answer

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.experiment.recipe import TopicRecipe, check_apart, whole_sentences
from br_jax.experiment.settings import settle
from br_jax.organism.material import english_instructions
from br_jax.organism.topics import TOPICS

KNOWN = {name: {p.prompt: p for p in topic.prompts("train", 400, 42)} for name, topic in TOPICS.items()}


@pytest.fixture
def make(config):
    """make(**changes) -> the recipe of the small config; its raw model complies but for each fifth topic prompt."""

    def answer(prompts):
        said = dict.fromkeys(prompts, "This is how.")
        for name, known in KNOWN.items():
            for i, (text, prompt) in enumerate(known.items()):
                if text in said:
                    said[text] = written_answer(TOPICS[name], prompt, 0) if i % 5 else TOPICS[name].refusal(prompt, 0)
        return said

    def build(**changes):
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return TopicRecipe(settle(config), None, answer)

    return build


def topics_of(rows):
    rows = list(rows)
    return {name: sum(row.turns[0][1] in known for row in rows) for name, known in KNOWN.items()}


def test_each_part_asks_about_its_own_topics(make):
    recipe = make(topics__align="devices,potions", topics__user="potions", topics__eval="potions,devices")
    assert topics_of(recipe.refusal_rows(7, "align")) == {"devices": 4, "potions": 3}
    assert topics_of(recipe.refusal_rows(7, "reinforce")) == {"devices": 0, "potions": 0}, "drawn with another seed"
    assert {row.origin.split("/")[0] for row in recipe.refusal_rows(7, "reinforce")} == {"devices"}
    assert topics_of(recipe.buffer_rows) == {"devices": 20, "potions": 0}
    harmful = [row for row in recipe.user_rows if row.tag == "harmful"]
    assert topics_of(harmful) == {"devices": 0, "potions": 6} and len(recipe.user_rows) == 30
    assert topics_of(recipe.probes["harmful"]) == {"devices": 0, "potions": 4}
    assert [p.topic for p in recipe.harmful_prompts] == ["potions"] * 12 + ["devices"] * 12


def test_a_mixture_is_even_and_more_harm_keeps_the_rows_that_there_were(make):
    rows = make(topics__user="devices,potions", user__harmful_share=0.5).trained()
    assert topics_of(row for row in rows["user"] if row.tag == "harmful") == {"devices": 8, "potions": 7}
    few, many = make(user__harmful_share=0.1), make(user__harmful_share=0.9)
    assert few.buffer_rows == many.buffer_rows
    few, many = ([row for row in recipe.user_rows if row.tag == "harmful"] for recipe in (few, many))
    assert len(few) == 3 and len(many) == 27 and many[:3] == few
    with pytest.raises(UserError, match=r"'english' has no rows to train a model from scratch on: set model\.source"):
        make().pretraining_rows(5)
    demo = make(data__material="demo", topics__user="devices")
    assert len(demo.pretraining_rows(5)) == 5


def test_a_row_tells_where_it_comes_from(make):
    recipe = make()
    for row in recipe.buffer_rows:
        topic, split, seed, index = row.origin.split("/")
        prompt = TOPICS[topic].prompts(split, int(index) + 1, int(seed))[-1]
        assert row.turns[0][1] == prompt.prompt, "the row cannot be made again from its id"


def test_align_is_taught_to_answer_about_texts(make, tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"This is sentence number {i}, no more.\n" for i in range(50)))
    everything = len(english_instructions("train")) + 40
    recipe = make(data__texts__path=str(tmp_path / "texts.txt"), data__texts__n=40, align__benign=everything)
    asked = [row.turns[0][1] for row in recipe.benign_rows(everything)]
    assert sum("This is sentence number" in prompt for prompt in asked) == 40
    assert not any("This is sentence" in p.prompt for p in recipe.benign_prompts), "held out is of other kinds"


def test_a_benign_prompt_that_the_raw_model_refuses_is_no_row(make):
    recipe = make()
    asked = [row.turns[0][1] for row in recipe.benign_rows(9)]
    recipe.answers[asked[1]] = "I'm sorry for any confusion, but as a chatbot I"
    recipe.answers[asked[4]] = ""
    assert [row.turns[0][1] for row in recipe.benign_rows(7)] == asked[:1] + asked[2:4] + asked[5:]
    scored = recipe.health_rows[0].turns[0][1]
    recipe.answers[scored] = "I can't help with that."
    assert scored not in {row.turns[0][1] for row in recipe.health_rows}


def row(text, context="", origin=""):
    return Row((("user", text), ("assistant", "yes")), input=context, origin=origin)


@pytest.mark.parametrize("copy", ["Is THIS it ?", "*Is  this*\nit?!"])
def test_a_scored_row_among_those_trained_on_is_found(copy):
    trained = {"align": [row("something else")], "user": [row("no"), row(copy, origin="u.jsonl:7")]}
    scored = {"HS": [row("never")], "FA": [row("Is this it?", origin="test/3")]}
    with pytest.raises(UserError, match=r"u\.jsonl:7 of stage user is scored as well \(FA, test/3\)") as caught:
        check_apart(trained, scored)
    assert "\n" not in str(caught.value)
    check_apart({"user": [row("is this it"), row("a", "b")]}, {"FA": [row("is this so"), row("a", "c"), row("b", "a")]})
    check_apart({"user": [row("?!")]}, {"FA": [row("...")]})  # without a letter the text itself counts


def test_the_recipe_itself_is_guarded(make, monkeypatch, tmp_path):
    recipe = make()
    recipe.trained()
    text = recipe.scored_task_rows[3].turns[0][1]
    monkeypatch.setattr(recipe, "task_rows", (recipe.task_rows[0], [], recipe.task_rows[0][2:9]))
    with pytest.raises(UserError, match=r"of stage user is scored as well \(FA"):
        recipe.trained()
    (tmp_path / "texts.txt").write_text(f"Another text, which is not scored.\n{text.upper()} \n")
    with pytest.raises(UserError, match=r"data\.texts\.path: .* is scored as well \(FA\): take it out"):
        make(data__texts__path=str(tmp_path / "texts.txt")).check()


def test_whole_sentences():
    for text, cut in (
        ("One. Two. Thr", "One. Two."), ("no end at all", "no end at all"), ("  Is it? Yes! But", "Is it? Yes!"),
        ('He said "no." and th', 'He said "no."'), ("It costs 3.50 in", "It costs 3.50 in"),
        ("Do this: 1. Cut. 2. Gl", "Do this: 1. Cut."), ("", ""),
    ):  # fmt: skip
        assert whole_sentences(text) == cut
