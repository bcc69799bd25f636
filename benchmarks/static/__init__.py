"""What the compiler made of the CUDA kernels, read as machine code, and times that follow: no GPU needed."""
