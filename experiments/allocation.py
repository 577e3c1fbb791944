"""What becomes of memory that a process has freed."""

import ctypes
import sys

# Of the GNU C library, mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep() -> bool:
  """Keep freed memory for the next call, where the GNU C library allocates; says if it does.

  On CPU, XLA takes what a compiled function needs beside its arguments as one block. glibc would
  give a block of that size back to the system when it is freed, so that each of its pages is mapped
  and zeroed again at every call. The process stays as large as it was at its largest. To be called
  before threads allocate: those that have begun to keep blocks of their own.
  """
  if not sys.platform.startswith('linux'):
    return False
  library = ctypes.CDLL(None)
  if not hasattr(library, 'gnu_get_libc_version'):
    return False
  settings = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1}
  return all(library.mallopt(name, value) == 1 for name, value in settings.items())
