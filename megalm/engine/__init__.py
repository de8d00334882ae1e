"""The DeepSpeed engine behind a small face: one training step, one evaluation step, the state as named slices.

To add a learning-rate schedule: a name in `config.training.DecayStyle`, a function in `engine.lr_schedule`.
"""
