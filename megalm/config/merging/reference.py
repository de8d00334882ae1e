"""All flags as Markdown, for docs/configuration.md (a test keeps the file equal to this)."""

from megalm.config.deepspeed.reference import ABOUT, rows
from megalm.config.merging.flags import help_text, option_names
from megalm.config.merging.names import IMPLIED
from megalm.config.merging.nothing import NO_EFFECT
from megalm.config.merging.settings import SECTIONS, SETTINGS, Setting

_INTRODUCTION = """# Settings

Every setting is a flag of the launch script and a key of a recipe (YAML), under the section's name and with
underscores: `--num-layers 4` is `num_layers: 4` under `model:`. Order: defaults < recipes (`--config`, left to right) <
flags. The DeepSpeed JSON (`--deepspeed_config`) may say "auto" or nothing for what these settings say; where it says
something else than a recipe or a flag, that is an error which names both places; a flag wins over a JSON that a recipe
names, and the log says so. `--print-config` shows the merged result with the source of each value."""


def reference_markdown() -> str:
    """One table a section: flags, values, meaning; then the peers' flags that are accepted without effect."""
    parts = [_INTRODUCTION]
    for section, cls in SECTIONS.items():
        lines = [_row(setting) for setting in SETTINGS.values() if setting.section == section]
        about = " ".join((cls.__doc__ or "").split())
        parts.append(f"## {section}\n\n{about}\n\n| flag | value | meaning |\n|---|---|---|\n" + "\n".join(lines))
    lines = [f"| `--{name}` | {_cell(', '.join(of.values))} | {_cell(of.why)} |" for name, of in NO_EFFECT.items()]
    about = "What these ask for is always so. They may stand in a recipe too, under any section."
    parts.append(
        f"## Accepted, without effect\n\n{about}\n\n| flag | value | why |\n|---|---|---|\n" + "\n".join(lines)
    )
    keys = [f"| `{key}` | {_cell(text)} |" for key, text in rows()]
    parts.append(f"## Keys of the DeepSpeed JSON\n\n{ABOUT}\n\n| key | here |\n|---|---|\n" + "\n".join(keys))
    return "\n\n".join(parts) + "\n"


def _row(setting: Setting) -> str:
    positive, negative = option_names(setting)
    flags = " ".join(f"`{name}`" for name in positive + negative)
    same = [
        f"`--{alias}` is `{setting.flag} {value}`." for alias, (name, value) in IMPLIED.items() if name == setting.name
    ]
    value = "" if setting.is_bool else setting.metavar.strip("{}").replace(",", ", ")
    return f"| {flags} | {_cell(value)} | {_cell(' '.join([help_text(setting), *same]))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
