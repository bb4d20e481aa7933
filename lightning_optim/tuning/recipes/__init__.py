"""Published settings by kind of model, each number with its source, and which of them a model calls for."""

from __future__ import annotations

from lightning_optim.tuning.recipes.base import Batch, Recipe
from lightning_optim.tuning.recipes.known import RECIPES, recipe
from lightning_optim.tuning.recipes.recommendation import Recommendation, recommend

__all__ = ["RECIPES", "Batch", "Recipe", "Recommendation", "recipe", "recommend"]
