"""Operators of the Transformer that are worth a fused implementation, one file each.

To add one:

1. `kernels/<op>.py`: the public function, typed, with shapes, dtypes and the paper in its docstring. Its plain-torch
   body is the reference: it stays, as the oracle of the fused version and for machines without one. Statistics,
   exponentials and sums over a row are float32 whatever the input dtype; the result has the dtype of the input
   unless the docstring says otherwise.
2. `tests/kernels/test_<op>.py`: the reference against an independent formula in float64, gradients
   (`torch.autograd.gradcheck`), odd shapes, and a tolerance of its own for each dtype.
3. The fused version: the formula once in `csrc/<op>.h`, vectorised in `csrc/<op>_cpu.cpp`, its signature in
   `csrc/schema.cpp`, checks and allocation in `csrc/bindings.cpp`; fake implementation and gradient in `register` of
   the Python file; a check in `self_test.py`, and samples for torch's `opcheck` in the tests.

Kernels know tensors and numbers only: no configuration, no modules, no ranks.
"""
