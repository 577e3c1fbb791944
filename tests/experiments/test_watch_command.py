"""python -m experiments.watch."""

import http.client
import json
import socket
import threading

import pytest

from experiments import watch


@pytest.fixture
def run(tmp_path):
  """A work directory of two rounds."""
  rows = [{'round': n, 'judge/reward': n / 2} for n in range(2)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return tmp_path


@pytest.fixture
def ask(run):
  """ask(path, headers) -> (status, ETag, text) of a page of it."""
  opened = watch.server(run, port=0, samples=2)
  thread = threading.Thread(target=opened.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()

  def asked(path, **headers):
    link = http.client.HTTPConnection(watch.HOST, opened.server_address[1], timeout=20)
    link.request('GET', path, headers={key.replace('_', '-'): v for key, v in headers.items()})
    answer = link.getresponse()
    found = answer.status, answer.getheader('ETag'), answer.read().decode()
    link.close()
    return found

  yield asked
  opened.shutdown()
  thread.join()
  opened.server_close()


def test_the_page_shows_the_run_as_it_grows(run, ask):
  status, tag, text = ask('/')
  assert status == 200 and 'rounds 0 to 1' in text and '<svg' in text and "fetch('body'" in text
  assert ask('/body', If_None_Match=tag)[0] == 304  # nothing new
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write('{"round": 2, "judge/reward": 1.0}\n{"round": 3, "judge/re')  # one is being written
  sample = {'round': 2, 'prompt': 'why', 'response': '<script>alert(1)</script>'}
  (run / 'samples.jsonl').write_text(json.dumps(sample) + '\n')
  status, newer, text = ask('/body', If_None_Match=tag)
  assert status == 200 and newer != tag
  assert 'rounds 0 to 2' in text and 'Samples of round 2' in text
  assert '<script' not in text and '&lt;script&gt;' in text


def test_it_speaks_of_nothing_but_the_run_and_to_this_machine_alone(ask):
  assert ask('/metrics.jsonl')[0] == 404
  assert ask('/../../etc/passwd')[0] == 404
  assert ask('/body', Host='elsewhere.example')[0] == 403
  assert ask('/body', Host='localhost:8000')[0] == 200


def test_what_cannot_be_read_is_said_on_the_page(run, ask):
  (run / 'metrics.jsonl').write_text('no row\n')
  status, _, text = ask('/body')
  assert status == 200 and 'metrics.jsonl:1: not a row of JSON' in text


def test_a_run_that_has_written_nothing_yet(tmp_path):
  lead, sections = watch.contents(tmp_path, 2)
  assert lead.endswith('nothing written yet') and sections == []


def test_errors_are_one_line(command, run):
  missing = command('watch', str(run / 'nowhere'))
  assert missing.code == 1 and missing.error.startswith(f'error: {run / "nowhere"} is no directory')
  assert 'give a work directory' in command('watch').error
  assert 'port must lie between 0 and 65535' in command('watch', str(run), '--config.port=-1').error
  with socket.socket() as taken:
    taken.bind((watch.HOST, 0))
    taken.listen()
    port = taken.getsockname()[1]
    found = command('watch', f'--config.run={run}', f'--config.port={port}')
  assert found.code == 1 and len(found.err.splitlines()) == 1
  assert f'port {port} cannot be had' in found.error and '--config.port=0' in found.error
