"""C++ kernels for CPU, built once on first use and cached."""
