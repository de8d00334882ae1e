"""Building the kernels: where their sources are, the toolchain, the library and its cache, `megalm kernels`."""
