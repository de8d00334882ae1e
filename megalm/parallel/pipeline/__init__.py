"""Pipeline parallelism: who holds which layers, the stages of a rank, and a step through all of them."""
