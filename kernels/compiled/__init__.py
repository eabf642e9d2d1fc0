"""What the GPU compilers make of the Triton kernels, found out without a GPU.

`calls` lists calls as a model makes them, `worker` compiles what they launch for one target, and `report` runs the
workers and judges what they say.
"""
