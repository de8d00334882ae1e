"""Checkpoints: safetensors shards and a JSON manifest, each shard a slice of a named global tensor.

Any layout and any ZeRO stage loads what any other wrote. A checkpoint is absent or complete: it is written under a
temporary name, flushed, renamed, and only then named by `latest`.
"""
