"""The schema of recipes, and the functions that read and write them. Imports neither torch nor transformers."""

from linearize.recipe.reading import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_path,
    shipped_recipes,
)
from linearize.recipe.schema import (
    BUILTIN,
    SELF,
    CalibrateSpec,
    DataSpec,
    GateSpec,
    KeepSpec,
    LoraSpec,
    MixerSpec,
    Objective,
    Recipe,
    SourceSpec,
    Stage,
)

__all__ = [
    "BUILTIN",
    "SELF",
    "CalibrateSpec",
    "DataSpec",
    "GateSpec",
    "KeepSpec",
    "LoraSpec",
    "MixerSpec",
    "Objective",
    "Recipe",
    "SourceSpec",
    "Stage",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "recipe_path",
    "shipped_recipes",
]
