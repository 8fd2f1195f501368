"""The dispatcher's ops: libraries, fake kernels, autograd."""
