"""Optimizers by the name that --optimizer gives; one file each. A module of --import-module may add others."""

from megalm.engine.optimizers.adamw import AdamRecipe
from megalm.engine.optimizers.lion import LionRecipe
from megalm.engine.optimizers.muon import MuonRecipe
from megalm.engine.optimizers.recipe import OptimizerRecipe
from megalm.tables import Table

OPTIMIZERS: Table[OptimizerRecipe] = Table(
    "optimizer", {"adam": AdamRecipe(), "lion": LionRecipe(), "muon": MuonRecipe()}
)
