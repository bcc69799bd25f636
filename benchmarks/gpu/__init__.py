"""All that is claimed of the CUDA kernels, checked and measured by one command on a machine with an NVIDIA GPU.

    make gpu                                     # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --dry --out FOLDER  # the same code on the CPU with tiny sizes, nothing built

It needs torch with CUDA, numpy, setuptools, ninja, pytest and an nvcc; no network, nothing installed. The parts and
their order: see `__main__`.
"""
