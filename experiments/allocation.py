"""The memory of a process: how much was resident, on what pages, and what it keeps when freed."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

STATUS, REFERENCES = Path('/proc/self/status'), Path('/proc/self/clear_refs')

# Of the GNU C library, mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
HUGE_PAGES = 14  # of Linux, madvise(2)


def keep() -> bool:
  """Keep freed memory for the next call, where the GNU C library allocates; says if it does.

  On CPU, XLA takes what a compiled function needs beside its arguments as one block. glibc would
  give a block of that size back to the system when it is freed, so that each of its pages is mapped
  and zeroed again at every call. The process stays as large as it was at its largest. To be called
  before threads allocate: those that have begun to keep blocks of their own.

  What it keeps lies on huge pages (2 MiB on x86) where Linux gives them to who asks: a token's step
  reads every weight once, and of small pages the processor would look up a new one for each 4 KiB.
  """
  library = _gnu_library()
  if library is None:
    return False
  settings = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1}
  kept = all(library.mallopt(name, value) == 1 for name, value in settings.items())
  if kept:
    _ask_for_huge_pages(library)
  return kept


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
  """Of the next blocks, up to half the machine's memory; no page is taken before it is used."""
  page = os.sysconf('SC_PAGE_SIZE')
  size = page * os.sysconf('SC_PHYS_PAGES') // 2
  library.malloc.restype = ctypes.c_void_p
  block = library.malloc(ctypes.c_size_t(size))
  if block is not None:
    first = -(-block // page) * page
    room = ctypes.c_size_t((block + size - first) // page * page)
    library.madvise(ctypes.c_void_p(first), room, HUGE_PAGES)  # where there are none, nothing
    library.free(ctypes.c_void_p(block))


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
    _ask_for_huge_pages(library)  # the end of the heap was given back with what it was told
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
