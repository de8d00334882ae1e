"""`megalm preprocess`: text to indexed datasets."""

from megalm.data.preprocess.command import PEER_FLAGS, add_arguments, options_of, run
from megalm.data.preprocess.options import PreprocessOptions
from megalm.data.preprocess.pipeline import preprocess

__all__ = ["PEER_FLAGS", "PreprocessOptions", "add_arguments", "options_of", "preprocess", "run"]
