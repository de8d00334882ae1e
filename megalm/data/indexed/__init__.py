"""The indexed dataset PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM's: format, writer, reader, manifest."""
