"""`megalm preprocess`: text to indexed datasets."""

from megalm.data.preprocess.command import add_arguments, options_of, run
from megalm.data.preprocess.pipeline import PreprocessOptions, preprocess

__all__ = ["PreprocessOptions", "add_arguments", "options_of", "preprocess", "run"]
