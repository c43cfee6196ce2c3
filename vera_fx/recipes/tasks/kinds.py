"""The list of tasks, by the names that recipes call them by."""

from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.causal_lm import CausalLM
from vera_fx.recipes.tasks.classification import Classification
from vera_fx.recipes.tasks.embeddings import Embeddings
from vera_fx.recipes.tasks.images import Images
from vera_fx.recipes.tasks.protocol import TaskKind

_KINDS: dict[str, TaskKind] = {
    "classification": Classification,
    "causal-lm": CausalLM,
    "embeddings": Embeddings,
    "images": Images,
}


def kind_of(recipe: Recipe) -> TaskKind:
    """The kind of task that a recipe names."""
    return _KINDS[recipe.task]
