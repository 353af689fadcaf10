"""Triton kernels in which a row's bits do not depend on the batch; imported only for CUDA tensors."""
