"""A live page of a run: its curves and newest samples, while it goes on or afterwards.

  python -m experiments.watch runs/nash_md
  python -m experiments.watch --config.run=runs/nash_md --config.port=8001

Serves one page on 127.0.0.1, for this machine alone, and prints its address; Ctrl-C ends it. The
page asks every two seconds and is drawn anew only when the run has written something. A run that is
yet to begin may be watched too, once its work directory exists.
"""

import hashlib
import http.server
import json
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments.launch import launch
from rlhf_jax.evaluation import page, run_page
from rlhf_jax.metrics import METRICS, SAMPLES

HOST = '127.0.0.1'
LOCAL = (HOST, 'localhost')
WATCHED = (METRICS, SAMPLES, *run_page.FILES)


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.run = placeholder(str)  # a work directory; may stand first, without the flag
  config.port = 8000  # 0: any that is free
  config.samples = 6  # most that are shown
  return config


def run(config: ConfigDict) -> None:
  """Serves until it is interrupted.

  Raises:
    ValueError: the directory is missing, or the port is taken or no port.
  """
  if config.run is None:
    raise ValueError('give a work directory: python -m experiments.watch WORKDIR')
  with server(Path(config.run), port=config.port, samples=config.samples) as opened:
    print(f'watching {config.run}: http://{HOST}:{opened.server_address[1]}/', flush=True)
    opened.serve_forever()


def server(folder: Path, *, port: int, samples: int) -> http.server.ThreadingHTTPServer:
  """A server of the page of one work directory, bound and not yet serving.

  Raises:
    ValueError: the directory is missing, or the port is taken or no port.
  """
  if not folder.is_dir():
    raise ValueError(f'{folder} is no directory')
  if not 0 <= port < 2**16:
    raise ValueError(f'port must lie between 0 and {2**16 - 1}, got {port}')

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      # A page elsewhere that has its name resolve to this machine could else read the run.
      if urllib.parse.urlsplit(f'//{self.headers.get("Host", "")}').hostname not in LOCAL:
        return self._answer(403, 'this page is for this machine alone')
      if self.path not in ('/', '/body'):
        return self._answer(404, 'there is / alone')
      tag = state(folder)
      if self.path == '/body' and self.headers.get('If-None-Match') == tag:
        return self._answer(304, '', tag)
      try:
        shown = contents(folder, samples)
      except (OSError, ValueError) as error:  # the page says so, and asks again
        shown = str(error), []
      if self.path == '/body':
        return self._answer(200, page.body(*shown), tag)
      return self._answer(200, page.render(folder.resolve().name, *shown, live='body'), tag)

    def _answer(self, status: int, text: str, tag: str = '') -> None:
      content = text.encode('utf-8')
      self.send_response(status)
      self.send_header('Content-Type', 'text/html; charset=utf-8')
      self.send_header('Content-Length', str(len(content)))
      self.send_header('Cache-Control', 'no-store')
      if tag:
        self.send_header('ETag', tag)
      self.end_headers()
      if status != 304:
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
      """Nothing: a line every two seconds says nothing."""

  try:
    return http.server.ThreadingHTTPServer((HOST, port), Handler)
  except OSError as error:
    raise ValueError(
      f'port {port} cannot be had ({error.strerror}): give another, --config.port=0 takes any'
    ) from error


def contents(folder: Path, samples: int) -> tuple[str, list[page.Section]]:
  """(the line below the title, what the run has written so far)."""
  metrics, drawn = (rows(folder / name) for name in (METRICS, SAMPLES))
  lead = f'{folder}: nothing written yet'
  if metrics:
    lead = f'{folder}: rounds {metrics[0]["round"]} to {metrics[-1]["round"]}'
  return lead, run_page.sections(folder, metrics, drawn, pairs=samples)


def rows(path: Path) -> list[dict[str, Any]]:
  """The whole lines of a JSONL file; the last one may be in the middle of being written.

  Raises:
    ValueError: a whole line is no JSON.
  """
  if not path.is_file():
    return []
  whole = path.read_bytes().rpartition(b'\n')[0]
  found = []
  for number, line in enumerate(whole.split(b'\n'), start=1):
    if line.strip():
      try:
        found.append(json.loads(line))
      except ValueError as error:
        raise ValueError(f'{path}:{number}: not a row of JSON: {error}') from error
  return found


def state(folder: Path) -> str:
  """Another text whenever the run has written something."""
  paths = [folder / name for name in WATCHED]
  stats = [(path.name, path.stat()) for path in paths if path.is_file()]
  seen = [(name, one.st_size, one.st_mtime_ns) for name, one in stats]
  return f'"{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}"'


def main() -> None:
  """The work directory may be the first argument."""
  if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
    sys.argv[1] = f'--config.run={sys.argv[1]}'
  launch(__doc__ or '', get_config, run)


if __name__ == '__main__':
  main()
