"""A disk that takes no more."""

import resource
from contextlib import contextmanager


@contextmanager
def limited_file_size(size):
    """The kernel refuses to write files beyond `size` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
