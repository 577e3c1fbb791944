"""The most memory that was resident at once, of the process that asks."""

import re
from pathlib import Path


def resident() -> int:
  """Bytes. (`ru_maxrss` would be the parent's, from before the program was started.)"""
  status = Path('/proc/self/status').read_text(encoding='utf-8')
  return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status)[1])
