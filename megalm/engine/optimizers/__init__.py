"""Optimizers by the name that --optimizer gives; one file each. A module of --import-module may add others."""

from megalm.engine.optimizers.adamw import AdamSpec
from megalm.engine.optimizers.lion import LionSpec
from megalm.engine.optimizers.muon import MuonSpec
from megalm.engine.optimizers.spec import OptimizerSpec
from megalm.tables import Table

OPTIMIZERS: Table[OptimizerSpec] = Table("optimizer", {"adam": AdamSpec(), "lion": LionSpec(), "muon": MuonSpec()})
