"""What became of every setting of another trainer's configuration, and the recipe of those that megalm has."""

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megalm.config.merging.load import load
from megalm.config.merging.recipe import RecipeDumper
from megalm.config.merging.settings import SECTIONS, SETTINGS
from megalm.config.rules.layout import layout_problems
from megalm.errors import ConfigError

Fate = Literal["same", "renamed", "written", "nothing", "fill in", "launch", "REFUSED"]
"""same: megalm's own name; renamed: has another name or form here; written: the other trainer's default, which differs;
nothing: asks for what is always so; fill in: only a run of the script knows the value; launch: for the launcher."""
GIVES_WAY = (
    "apply_layernorm_1p", "sequence_parallel", "step_batch_size_schedule", "rampup_batch_size", "save_interval",
    "keep_checkpoints", "no_load_optim", "no_save_optim", "finetune", "loss_scale", "deepspeed_config",
    "lr_wsd_decay_iters", "lr_wsd_decay_samples", "recompute_num_layers", "recompute_method", "eval_interval",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip
"""Settings that are left out where they do not fit the rest, each with the parser's reason."""


@dataclass(frozen=True)
class Row:
    """One setting of the source."""

    theirs: str
    fate: Fate
    ours: str
    """What it is here, or why it is not."""


@dataclass
class Translation:
    """A configuration on its way."""

    source: str
    rows: list[Row] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    """Values by megalm's names."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    def add(self, theirs: str, fate: Fate, ours: str = "") -> None:
        """Note what became of a setting."""
        self.rows.append(Row(theirs, fate, ours))

    def give(self, theirs: str, name: str, value: Any, fate: Fate = "renamed") -> None:
        """Set `name`; a value that the setting cannot have is refused."""
        try:
            self.given[name] = SETTINGS[name].convert(value)
        except ValueError as error:
            self.add(theirs, "REFUSED", f"{name}={value} {error}")
        else:
            self.add(theirs, fate, f"{name}: {_shown(self.given[name])}")

    def settle(self) -> None:
        """Leave out what does not fit the rest, until the parser accepts the recipe.

        Raises:
            ConfigError: it does not without it either; every problem.
        """
        save, start = self.given.get("save"), self.given.get("load")
        if save is not None and save == start:
            del self.given["load"]
            self.add(f"load: {start}", "nothing", "the same command goes on with the run that `save` holds")
        while problems := self.problems():
            found = [
                (name, problem)
                for problem in problems
                for name in GIVES_WAY
                if name in self.given and re.search(rf"\b{name}\b", problem)
            ]
            if not found:
                raise ConfigError(problems)
            name, problem = found[0]
            self.add(f"{name}: {_shown(self.given.pop(name))}", "REFUSED", problem.partition(" (")[0])

    def problems(self) -> list[str]:
        """What the parser says to the recipe, on as many ranks as one copy of the model needs."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(self.recipe(), encoding="utf-8")
            try:
                config = load(["--config", str(path)]).config
            except ConfigError as error:
                return error.problems
        parallel = config.parallel
        return layout_problems(config, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)

    def recipe(self) -> str:
        """The recipe, settings under their sections."""
        content = {
            section: {name: _plain(self.given[name]) for name in cls.model_fields if name in self.given}
            for section, cls in SECTIONS.items()
        }
        filled = {section: values for section, values in content.items() if values}
        head = f"# Translated by `megalm translate` from {self.source}\n"
        return head + yaml.dump(filled, Dumper=RecipeDumper, sort_keys=False, default_flow_style=None, width=100)

    def table(self) -> str:
        """A line for each setting: theirs, what became of it, ours; then how many of each."""
        left = min(44, max((len(row.theirs) for row in self.rows), default=0))
        lines = [f"{row.theirs:<{left}}  {row.fate:<7}  {row.ours}".rstrip() for row in self.rows]
        counts = {fate: sum(row.fate == fate for row in self.rows) for fate in dict.fromkeys(r.fate for r in self.rows)}
        notes = [f"not read: {note}" for note in self.notes]
        return "\n".join([*lines, *notes, ", ".join(f"{count} {fate}" for fate, count in counts.items())])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
