"""All recipes by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning_optim.core.suggest import nearest
from lightning_optim.tuning.recipes import images, language, others
from lightning_optim.tuning.recipes.base import Recipe

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {each.name: each for each in (*language.RECIPES, *images.RECIPES, *others.RECIPES)}
)
"""The recipes by name, kind by kind."""


def recipe(name: str) -> Recipe:
    """Return a recipe: published settings for one kind of model, each number with its source.

    Args:
        name: Its name; ``lightning-optim list recipes`` shows all. ``_`` and capital letters are accepted.

    Raises:
        ValueError: There is no such recipe; the message names the nearest.

    Example:
        >>> gpt = recipe("gpt")
        >>> gpt
        Recipe('gpt', optimizer='adamw', lr=0.0006, schedule='cosine')
        >>> [type(callback).__name__ for callback in gpt.callbacks()]
        ['ConfigureOptimizers', 'GradientClipping', 'DivergenceGuard', 'OptimizerMonitor']
    """
    if (found := RECIPES.get(str(name).lower().replace("_", "-"))) is None:
        raise ValueError(f"Unknown recipe {name!r}. {nearest(str(name), RECIPES)}")
    return found
