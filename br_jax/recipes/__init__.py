"""Which rows each stage trains on and each score is measured on: the data of an experiment."""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from br_jax.recipes.base import Recipe
from br_jax.recipes.paper import PaperRecipe
from br_jax.recipes.topics import TopicRecipe


def make_recipe(config: ConfigDict, answer: Callable[[Sequence[str]], dict[str, str]]) -> Recipe:
    """The recipe of a config: the paper's data sets (`data.material = "paper"`), or an invented topic.

    Args:
        config: of the experiment.
        answer: gives the raw model's answers to prompts, where rows are made of them.
    """
    return PaperRecipe(config) if config.data.material == "paper" else TopicRecipe(config, answer)
