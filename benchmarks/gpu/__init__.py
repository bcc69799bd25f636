"""Checks and measures the CUDA kernels on a machine with an NVIDIA GPU, in eight minutes.

    make gpu                                     # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --dry --out FOLDER  # the same commands on the CPU, with tiny sizes and nothing built
    python -m benchmarks.gpu.speed steps         # one part by itself
    make rehearse                                # all parts, from a bare clone, against a pretended card

It needs torch with CUDA, numpy, setuptools, ninja, pytest, hypothesis and nvcc. It needs no network and installs
nothing. Where diffusers is installed, its step is timed, too. `parts` lists what is done, in which order, and how much
time each part has.
"""
