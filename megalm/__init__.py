"""megalm: large-scale training of language models on DeepSpeed, from a laptop CPU to a SLURM cluster."""

__version__ = "0.1.0"
