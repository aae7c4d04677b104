"""Many erasures from one recipe: a grid of bases, concepts, methods and seeds, one result file per cell."""

from erasure.batch.recipe import Cell, Recipe
from erasure.batch.runner import run

__all__ = ["Cell", "Recipe", "run"]
