"""The memory of a process: how much was resident, and what becomes of what it has freed."""

import ctypes
import re
import resource
import sys
from pathlib import Path

STATUS, REFERENCES = Path('/proc/self/status'), Path('/proc/self/clear_refs')

# Of the GNU C library, mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep() -> bool:
  """Keep freed memory for the next call, where the GNU C library allocates; says if it does.

  On CPU, XLA takes what a compiled function needs beside its arguments as one block. glibc would
  give a block of that size back to the system when it is freed, so that each of its pages is mapped
  and zeroed again at every call. The process stays as large as it was at its largest. To be called
  before threads allocate: those that have begun to keep blocks of their own.
  """
  library = _gnu_library()
  if library is None:
    return False
  settings = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1}
  return all(library.mallopt(name, value) == 1 for name, value in settings.items())


def resident() -> int:
  """Bytes: the most that was resident at once since the process began, or the last `forget`.

  Linux says it of the program itself. `ru_maxrss`, for other systems, can be the parent's, from
  before the program was started.
  """
  if STATUS.exists():
    found = re.search(r'VmHWM:\s+(\d+) kB', STATUS.read_text(encoding='utf-8'))
    if found is not None:
      return 1024 * int(found[1])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def forget() -> bool:
  """Give freed memory back to the system and let `resident` begin anew; says if it does."""
  library = _gnu_library()
  if library is not None:
    library.malloc_trim(0)
  try:
    REFERENCES.write_text('5', encoding='utf-8')  # proc(5): the peak becomes what there is now
  except OSError:
    return False
  return True


def _gnu_library() -> ctypes.CDLL | None:
  """The GNU C library, where this process has it."""
  if not sys.platform.startswith('linux'):
    return None
  library = ctypes.CDLL(None)
  return library if hasattr(library, 'gnu_get_libc_version') else None
