"""Tensors and ints in, tensors out: the operations a shard needs, for CUDA (Triton) and for CPU (torch).

`ops` is the door. `reference` defines every operation in plain torch; `triton/` and `cpu/` implement them.
"""
