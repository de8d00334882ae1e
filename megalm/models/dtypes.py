"""The dtypes that a model can have, by the names that the configuration uses."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
