"""What the tests of the kernels compile, made while something else is waited for: `python -m kernels.compile_ahead`.

It needs torch and no other package: .ci/run calls it while the other packages are installed.
"""

from kernels import emulated, with_nvcc

if __name__ == "__main__":
    emulated.build()
    if with_nvcc.NVCC is not None:
        with_nvcc.compiled(with_nvcc.NEWEST)
