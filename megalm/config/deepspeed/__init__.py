"""DeepSpeed's JSON: the keys that it may hold, reading it, and writing the final one for `deepspeed.initialize`."""
