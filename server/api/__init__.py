"""HTTP only: no torch, no kernels, no engine internals."""
