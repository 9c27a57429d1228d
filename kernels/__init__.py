"""Triton kernels, installed as dwa_fast.kernels. They import only torch and triton; arguments are checked by dwa_fast.ops."""
