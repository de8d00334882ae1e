"""Decoder-only models in the style of GPT-2 and Llama: the model, its initial values, its FLOPs."""
