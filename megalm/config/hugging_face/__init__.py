"""The settings of a model as `transformers` writes them (`config.json`), and as megalm does: both ways.

`ARCHITECTURES` has a line for each class of transformers; `read_settings` takes one's config.json apart and
`write_settings` makes one, `architecture_of` finds the class that a model is an instance of.
"""

from megalm.config.hugging_face.architectures import ARCHITECTURES, Architecture
from megalm.config.hugging_face.settings import (
    architecture_of,
    read_folder,
    read_settings,
    same_model,
    write_settings,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_of",
    "read_folder",
    "read_settings",
    "same_model",
    "write_settings",
]
