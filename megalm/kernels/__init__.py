"""Operators of the Transformer that are worth a fused implementation, one file each.

To add one:

1. `kernels/<op>.py`: the public function, typed, with shapes, dtypes and the paper in its docstring. Its plain-torch
   body is the reference: it stays, as the oracle of the fused version and for machines without one. Statistics,
   exponentials and sums over a row are float32 whatever the input dtype; the result has the dtype of the input
   unless the docstring says otherwise. Below it `register`, with fake implementation and gradient, and `CHECKS`.
2. The fused version: the formula once in `csrc/<op>.h`, with its kernels' arguments; vectorised in `<op>_cpu.cpp`, for
   GPUs in `<op>_cuda.cu`; signature, checks and allocation in `<op>_bindings.cpp`. The build finds them by their names.
3. A line in the table `OPERATORS` of `registration.py`, and in `choice.py` if models call it.
4. `tests/kernels/test_<op>.py`: the reference against an independent formula in float64, gradients
   (`torch.autograd.gradcheck`), odd shapes, a tolerance of its own for each dtype; the fused version against the
   reference, and samples for torch's `opcheck`.

Kernels know tensors and numbers only: no configuration, no modules, no ranks.
"""
