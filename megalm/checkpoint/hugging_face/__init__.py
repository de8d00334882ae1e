"""Models of Hugging Face's transformers: a folder with config.json and safetensors, read slice by slice and written."""

from megalm.checkpoint.hugging_face.export import export_model
from megalm.checkpoint.hugging_face.folder import HuggingFaceReader
from megalm.checkpoint.hugging_face.importing import import_model

__all__ = ["HuggingFaceReader", "export_model", "import_model"]
