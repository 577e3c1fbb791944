"""The remote judge against a real server on loopback, well-behaved and not."""

import asyncio
import datetime
import email.utils
import logging
import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import endpoint
import numpy as np
import pytest
from endpoint import after, cut, gives, raw, says, serving, trickles

from rlhf_jax.judges import bought, programmatic, remote, rubric
from rlhf_jax.judges.base import JudgeError
from rlhf_jax.judges.programmatic import RowError
from rlhf_jax.types import Prompts, Responses

ROOT = Path(__file__).resolve().parents[2]
PAIR = "{% set answers = {'A': 1, 'B': 0} %}{{ prompt }}|{{ first }}|{{ second }}"
POINT = "{% set answers = {'1': 1, '2': 2, '3': 3} %}{{ prompt }}|{{ response }}"
KEY = 'sk-very/secret-0123456789'
HASTY = remote.Manner(concurrency=4, timeout=10.0, retries=2, deadline=30.0, backoff=0.01)


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
  """A proxy of the machine's own has no business on loopback."""
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')


@pytest.fixture
def make(tmp_path):
  """make(server, text of a rubric, ...): the function that asks it."""

  def made(server, text=PAIR, **changes):
    settings = {
      'endpoint': server.url,
      'model': 'm',
      'rubric': rubric.parse(text, 'test'),
      'cache': tmp_path / 'cache' / 'judge.sqlite',
      'manner': HASTY,
    }
    return remote.function(**{**settings, **changes})

  return made


def better(body, _):
  """A deterministic judge: A with probability σ(length of the first − of the second)."""
  _, first, second = endpoint.texts(body).split('|')
  p = 1 / (1 + math.exp(len(second) - len(first)))
  return says('A' if p >= 0.5 else 'B', {'A': p, 'B': 1 - p})


def judge(function):
  return programmatic.from_function(function, decode, 'remote m')


def decode(prompts, responses):
  del prompts
  return [[''.join(map(chr, row)) for row in rows] for rows in np.asarray(responses.tokens)]


def responses(*rows):
  """responses('ab', 'cd'): two prompts, two responses of one letter each."""
  tokens = np.array([[[ord(letter)] for letter in row] for row in rows])
  weights = np.full(tokens.shape[:2], 1 / tokens.shape[1], np.float32)
  return Responses(tokens, tokens > 0, tokens > 0, weights > 0, tokens, {}, weights, 1.0, {})


def prompts(*texts):
  tokens = np.zeros((len(texts), 1), np.int32)
  return Prompts(tokens, tokens == 0, tokens[:, 0], tuple(texts))


# --- what is asked, and what it is worth ---------------------------------------------------------


def test_a_question_is_the_rubric_posted_with_model_and_key(make):
  text = "{% set system %}Be fair to {{ prompt }}.{% endset %}{% set parameters = {'seed': 3, "
  text += "'logprobs': none} %}" + PAIR
  with serving(better) as server:
    assert make(server, text, key=KEY)(['p'], ['aa'], ['a']) == [
      pytest.approx(1 / (1 + 1 / math.e))
    ]
  ((path, headers, body),) = server.log
  assert path == '/v1/chat/completions' and headers['Authorization'] == f'Bearer {KEY}'
  assert body == {
    'model': 'm',
    'messages': [
      {'role': 'system', 'content': 'Be fair to p.'},
      {'role': 'user', 'content': 'p|aa|a'},
    ],
    'temperature': 0,
    'max_tokens': 16,
    'top_logprobs': 5,
    'seed': 3,
  }
  with serving(better) as server:
    make(server)(['p'], ['aa'], ['b'])
  assert 'Authorization' not in server.log[0][1]


@pytest.mark.parametrize(
  ('act', 'value'),
  [
    (says('A'), 1.0),  # no log-probs: what was said
    (says('B', None, logprobs=None), 0.0),
    (says(' **B**.'), 0.0),
    (says('<think>A or B? A!</think>\n\nB'), 0.0),
    (says('A', {}), 1.0),  # log-probs without alternatives
    # The allowed answers alone count: .6 / (.6 + .2), two spellings of A together.
    (says('A', {'A': 0.5, ' A': 0.1, 'B': 0.2, 'C': 0.2}), 0.75),
    (says('A', {'A': 0.9, 'B': 0.0}), 1.0),
  ],
)
def test_an_answer_is_worth_its_log_probs_else_its_value(make, act, value):
  with serving(lambda *_: act) as server:
    assert make(server)(['p'], ['x'], ['y']) == [pytest.approx(value)]


def test_the_first_token_of_the_answer_counts_not_that_of_the_thought(make):
  def alternatives(a, b):
    return [{'token': 'A', 'logprob': math.log(a)}, {'token': 'B', 'logprob': math.log(b)}]

  tokens = [('<think>', 0.5), ('A', 0.9), ('</think>', 0.5), ('\n', 0.5), ('A', 0.7), ('.', 0.5)]
  content = [
    {'token': t, 'logprob': math.log(a), 'top_logprobs': alternatives(a, 1 - a)} for t, a in tokens
  ]
  act = says('<think>A</think>\nA.', None, logprobs={'content': content})
  with serving(lambda *_: act) as server:
    assert make(server)(['p'], ['x'], ['y']) == [pytest.approx(0.7)]


def test_a_pointwise_score_is_the_mean_of_its_answers(make):
  # (.25·1 + .25·2 + .5·3) / 1 = 2.25; without log-probs the digit.
  def reply(body, _):
    known = endpoint.texts(body).endswith('|x')
    return says('3', {'1': 0.25, '2': 0.25, '3': 0.5}) if known else says('2')

  with serving(reply) as server:
    assert make(server, POINT)(['p', 'q'], ['x', 'y']) == [pytest.approx(2.25), 2.0]


def test_words_are_told_by_their_first_token(make):
  text = "{% set answers = {'first': 1, 'second': 0} %}{{ prompt }}{{ first }}{{ second }}"
  content = [
    {
      'token': ' fir',
      'logprob': math.log(0.8),
      'top_logprobs': [{'token': ' sec', 'logprob': math.log(0.2)}],  # the one taken is left out
    },
    {'token': 'st', 'logprob': 0.0, 'top_logprobs': []},
  ]
  act = says(' first', None, logprobs={'content': content})
  with serving(lambda *_: act) as server:
    assert make(server, text)(['p'], ['x'], ['y']) == [pytest.approx(0.8)]


@pytest.mark.parametrize('text', ['C', '', None, 'A better one is B', 'a', '7/10', 'A1'])
def test_an_answer_outside_the_allowed_ones_is_refused_or_worth_otherwise(make, text):
  with serving(lambda *_: says(text)) as server:
    with pytest.raises(RowError, match=r"none of \['A', 'B'\], after 3 attempts"):
      make(server)(['p'], ['x'], ['y'])
    assert make(server, '{% set otherwise = 0.5 %}' + PAIR)(['p'], ['x'], ['y']) == [0.5]


def test_both_orders_are_asked_and_a_liking_for_the_first_place_cancels(make):
  def reply(body, _):
    _, first, second = endpoint.texts(body).split('|')
    p = {'ab': 0.9, 'ba': 0.5, 'ac': 0.8, 'ca': 0.8, 'bc': 0.6, 'cb': 0.2}[first + second]
    return says('A', {'A': p, 'B': 1 - p})

  with serving(reply) as server:
    wins = judge(make(server)).wins(prompts('p'), responses('abc'), None)
  # (.9 + 1 − .5)/2 = .7, (.8 + 1 − .8)/2 = .5, (.6 + 1 − .2)/2 = .7
  expected = [[0.5, 0.7, 0.5], [0.3, 0.5, 0.7], [0.5, 0.3, 0.5]]
  np.testing.assert_allclose(np.asarray(wins)[0], expected, atol=1e-6)
  assert len(server.log) == 6  # three pairs, two orders


def test_a_plan_buys_what_it_names_and_no_more(make):
  plan = np.zeros((2, 3, 3), bool)
  plan[0, 0, 2] = plan[1, 2, 1] = True
  with serving(better) as server:
    judge(make(server)).wins(prompts('p', 'q'), responses('abc', 'def'), None, plan)
  asked = sorted(endpoint.texts(body) for *_, body in server.log)
  assert asked == ['p|a|c', 'p|c|a', 'q|e|f', 'q|f|e']


def test_equal_questions_are_asked_once_and_equal_texts_never(make):
  with serving(better) as server:
    values = make(server)(['p', 'p', 'p', 'q'], ['aa', 'aa', 'b', 'aa'], ['b', 'b', 'b', 'b'])
  assert values[0] == values[1] == values[3] and values[2] == 0.5
  assert sorted(endpoint.texts(body) for *_, body in server.log) == ['p|aa|b', 'q|aa|b']


def test_half_a_surrogate_pair_can_be_asked(make):
  with serving(better) as server:
    make(server)(['p'], ['\ud800'], ['yy'])
  assert endpoint.texts(server.log[0][2]) == 'p|?|yy'


# --- a server that misbehaves --------------------------------------------------------------------

BAD = {
  'slow': (after(0.8, says('A')), 'no answer within 0.4 s'),
  'trickling': (trickles, 'no answer within 0.4 s'),
  '429': (raw(b'{"error": {"message": "slow\\ndown"}}', 429), 'status 429 (slow down)'),
  '500': (raw(b'oh no', 500), 'status 500 (oh no)'),
  'empty 503': (raw(b'', 503), 'status 503 (Service Unavailable)'),
  'cut': (cut, 'RemoteProtocolError'),
  'invalid JSON': (raw(b'{"choices": [{]'), 'no chat completion: invalid JSON'),
  'no UTF-8': (raw(b'\xff\xfe\xff'), 'no chat completion: invalid JSON'),
  'deep JSON': (raw(b'[' * 200_000), 'no chat completion'),
  'two choices': (
    gives({'choices': [{}, {}]}),
    'no chat completion: 2 choices where 1 was asked for',
  ),
  'no choices': (gives({'choices': []}), 'no chat completion: 0 choices where 1 was asked for'),
  'an error with 200': (
    gives({'error': {'message': 'no credit'}}),
    'no chat completion: no choices where 1 was',
  ),
  'a list': (gives([1]), 'no chat completion: no choices where 1 was asked for'),
  'no message': (gives({'choices': [{}]}), 'no chat completion: '),
  'a message of text': (gives({'choices': [{'message': 'A'}]}), 'no chat completion: '),
  'content in parts': (says([{'text': 'A'}]), 'no chat completion: content that is no text'),
  'log-probs of text': (says('A', None, logprobs='high'), 'no chat completion: '),
  'NaN': (
    says('A', None, logprobs={'content': [{'token': 'A', 'logprob': math.nan}]}),
    'no chat completion: a log-probability that is no number',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_what_may_pass_is_tried_again(make, name):
  act, _ = BAD[name]
  timed = name in ('slow', 'trickling')  # where the machine is busy, so may a good answer be
  manner = HASTY._replace(timeout=0.4, retries=30) if timed else HASTY
  with serving(lambda body, count: act if count < 3 else better(body, count)) as server:
    f = make(server, manner=manner)
    assert f(['p'], ['xx'], ['y']) == [pytest.approx(1 / (1 + 1 / math.e))]
  (count,) = server.asked.values()
  assert count >= 3 if timed else count == 3


@pytest.mark.parametrize('name', BAD)
def test_what_does_not_pass_is_one_clear_line(make, name):
  act, said = BAD[name]
  timed = name in ('slow', 'trickling')
  manner = HASTY._replace(retries=1, timeout=0.4 if timed else 10.0)
  with serving(lambda *_: act) as server, pytest.raises(JudgeError) as caught:
    judge(make(server, manner=manner)).wins(
      prompts('p', 'q'), responses('a', 'b'), responses('c', 'd')
    )
  line = str(caught.value)
  assert line.startswith(f'judge remote m: {server.url}/v1/chat/completions gave {said}'), line
  assert ', after 2 attempts in ' in line and '\n' not in line and len(line) < 500
  assert line.endswith(
    (
      "asked for prompt 0, response 0 and opponent response 0, read in this order ('p', 'a', 'c')",
      "asked for prompt 1, response 0 and opponent response 0, read in this order ('q', 'b', 'd')",
    )
  )


@pytest.mark.parametrize('status', [301, 400, 401, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(make, status):
  reply = raw(b'{"error": {"message": "never"}}', status, Location='http://127.0.0.1:9/')
  said = rf'status {status} \(never\), after 1 attempt in'
  with serving(lambda *_: reply) as server, pytest.raises(RowError, match=said):
    make(server)(['p'], ['x'], ['y'])
  assert len(server.log) == 1


def test_nobody_there(make):
  with serving(better) as server:
    pass
  with pytest.raises(RowError, match=r'gave ConnectError: .*, after 3 attempts'):
    make(server)(['p'], ['x'], ['y'])


@pytest.mark.parametrize('form', ['seconds', 'date'])
def test_retry_after_holds_every_question(make, form):
  """The first is told to wait: it is not sent again before that, nor the third begun."""
  date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
  header = '0.5' if form == 'seconds' else email.utils.format_datetime(date, usegmt=True)
  times = {}

  def reply(body, count):
    times[endpoint.texts(body)[0], count] = time.monotonic()
    if endpoint.texts(body)[0] == 'p':
      return raw(b'', 429, Retry_After=header) if count == 1 else better(body, count)
    return after(0.1, better(body, count))

  with serving(reply) as server:
    make(server, manner=HASTY._replace(concurrency=2))([*'pqr'], [*'xxx'], [*'yyy'])
  assert times.keys() == {('p', 1), ('q', 1), ('r', 1), ('p', 2)}
  # A date has whole seconds, so that of two seconds 1 to 2 are left.
  wait = 0.49 if form == 'seconds' else 0.9
  assert times['p', 2] - times['p', 1] > wait and times['r', 1] - times['p', 1] > wait


def test_a_wait_beyond_the_deadline_is_not_begun(make):
  since = time.monotonic()
  act, said = raw(b'', 429, Retry_After='3600'), r'left alone for 3600 s, after 1 attempt'
  with serving(lambda *_: act) as server, pytest.raises(RowError, match=said):
    make(server)(['p'], ['x'], ['y'])
  assert time.monotonic() - since < 5 and len(server.log) == 1


def test_the_deadline_ends_a_question_whatever_its_retries(make):
  manner = HASTY._replace(retries=1000, deadline=0.6, timeout=10.0, backoff=0.05)
  since = time.monotonic()
  act = after(0.1, raw(b'', 500))  # the last attempt has less than its time: 'no answer within'
  with serving(lambda *_: act) as server, pytest.raises(RowError, match=r'attempts in 0\.'):
    make(server, manner=manner)(['p'], ['x'], ['y'])
  assert 0.3 < time.monotonic() - since < 2 and 2 <= len(server.log) <= 6


def test_no_more_than_concurrency_are_asked_at_once(make):
  asked = ['p'] * 12, [str(n) for n in range(12)], ['y'] * 12
  with serving(lambda *request: after(0.05, better(*request))) as server:
    make(server, manner=HASTY._replace(concurrency=3))(*asked)
  assert server.most == 3 and len(server.log) == 12


def test_a_failure_loses_nothing_that_was_under_way_and_begins_nothing_new(make):
  """0 fails at once, 1 is answered a moment later, 2 and 3 wait for their turn and never get it."""

  def reply(body, count):
    if endpoint.texts(body).startswith('p|0'):
      return after(0.1, raw(b'', 400))
    return after(0.3, better(body, count))

  asked = ['p'] * 4, ['0', '1', '2', '3'], ['yy'] * 4
  with serving(reply) as server:
    f = make(server, manner=HASTY._replace(concurrency=2))
    with pytest.raises(RowError, match='status 400') as caught:
      f(*asked)
    assert caught.value.row == 0
    assert sorted(endpoint.texts(body) for *_, body in server.log) == ['p|0|yy', 'p|1|yy']
    server.reply = better
    f(*asked)
  assert sorted(server.answered.values()) == [1, 1, 1, 1]  # the second is not bought again


def test_a_failure_ends_the_waits_of_the_others(make):
  def reply(body, _):
    return after(0.2, raw(b'', 400)) if endpoint.texts(body)[2] == '1' else raw(b'', 500)

  since, manner = time.monotonic(), HASTY._replace(retries=10**6, backoff=25.0)
  with serving(reply) as server, pytest.raises(RowError, match='status 400'):
    make(server, manner=manner)(['p'] * 4, ['0', '1', '2', '3'], ['y'] * 4)
  # Waits of up to 25 s are broken off and no attempt follows; some are over before the failure.
  assert time.monotonic() - since < 5 and sum(server.asked.values()) < 4 + 3


def test_within_a_running_loop(make):
  async def notebook():
    return make(server)(['p'], ['x'], ['y'])

  with serving(better) as server:
    assert asyncio.run(notebook()) == [0.5]


# --- the cache -----------------------------------------------------------------------------------


def test_what_was_bought_is_not_asked_again(make, tmp_path):
  asked = ['p', 'q'], ['xx', 'y'], ['y', 'xx']
  with serving(better) as server:
    first = make(server)(*asked)
  # Nobody is there any more, and the address is another: the values are the same to the bit.
  elsewhere = make(server, endpoint='http://127.0.0.1:9/v1', key=KEY)
  assert elsewhere(*asked) == first
  rows = sqlite3.connect(tmp_path / 'cache' / 'judge.sqlite').execute(
    'SELECT value, model, answer, how FROM bought ORDER BY value'
  )
  assert rows.fetchall() == [(first[1], 'm', 'B', 'logprobs'), (first[0], 'm', 'A', 'logprobs')]


@pytest.mark.parametrize(
  ('text', 'changes'),
  [
    (PAIR, {'model': 'n'}),
    (PAIR + '!', {}),
    ("{% set parameters = {'temperature': 1} %}" + PAIR, {}),
    (PAIR.replace("'B': 0", "'B': 0.1"), {}),
    ('{% set otherwise = 0 %}' + PAIR, {}),
  ],
)
def test_another_judge_is_another_question(make, text, changes):
  with serving(lambda *_: says('A')) as server:
    make(server)(['p'], ['x'], ['y'])
    make(server, text, **changes)(['p'], ['x'], ['y'])
    make(server, text, **changes)(['p'], ['x'], ['y'])
  assert len(server.log) == 2


KEEPS = """
import itertools, pathlib, sys, time
from rlhf_jax.judges import bought
with bought.opened(sys.argv[1]) as store:
  for n in itertools.count():  # until it is told to stop
    store.keep([bought.Entry(f'theirs-{n}', n / 7, 'm', 'A', 'answer')])
    time.sleep(0.005)
    if pathlib.Path(sys.argv[2]).exists():
      store.keep([bought.Entry('count', n + 1, 'm', 'A', 'answer')])
      break
"""


def test_processes_share_a_cache(tmp_path):
  path, stop = tmp_path / 'judge.sqlite', tmp_path / 'stop'
  words = [sys.executable, '-c', KEEPS, str(path), str(stop)]
  other = subprocess.Popen(words, env=os.environ | {'PYTHONPATH': str(ROOT)})
  with bought.opened(path) as store:
    while store.find('theirs-1') is None:
      assert other.poll() is None
      time.sleep(0.01)
    for n in range(5):
      store.keep([bought.Entry(f'ours-{n}', n / 3, 'm', 'A', 'answer')])
    assert other.poll() is None and store.find('count') is None  # both have been writing
    stop.touch()
    assert other.wait() == 0
    assert [store.find(f'ours-{n}') for n in range(5)] == [n / 3 for n in range(5)]
    count = int(store.find('count'))
    assert [store.find(f'theirs-{n}') for n in range(count)] == [n / 7 for n in range(count)]
    # Who comes second takes over what the first has bought.
    assert store.keep([bought.Entry('theirs-1', 5.0, 'm', 'A', 'answer')]) == [1 / 7]
    assert store.find('theirs-1') == 1 / 7
    assert store.find('nothing') is None


@pytest.mark.parametrize('kind', ['text', 'database', 'folder', 'below a file'])
def test_what_is_no_cache_is_refused_and_left_alone(make, tmp_path, kind):
  path = tmp_path / 'here'
  if kind == 'text':
    path.write_text('x' * 5000)
  elif kind == 'database':
    with sqlite3.connect(path) as connection:
      connection.execute('CREATE TABLE other (a)')
  elif kind == 'folder':
    path.mkdir()
  else:
    path.write_text('')
    path /= 'judge.sqlite'
  before = path.read_bytes() if path.is_file() else None
  with serving(better) as server, pytest.raises(ValueError, match=r'^judge cache .*here'):
    make(server, cache=path)
  assert (path.read_bytes() if path.is_file() else None) == before


def test_nothing_is_written_or_contacted_before_the_first_question(make, tmp_path):
  with serving(better) as server:
    make(server)
  assert not server.log and not list(tmp_path.iterdir())


# --- the key -------------------------------------------------------------------------------------


def test_the_key_is_written_nowhere(make, tmp_path, caplog, capfd):
  """A server that throws the key back at us, in every layout and spelling."""
  echoes = [
    raw(KEY.encode(), 500),
    raw(KEY.replace('/', r'\/').encode(), 500),
    raw(b'{"error": {"message": "key %s is bad"}}' % KEY.encode(), 429),
    raw(b'x' * (remote.SHOWN - 5) + KEY.encode(), 500),  # cutting it short must not hide it
    gives({'choices': KEY}),
    says(KEY),
    says([KEY]),
    says(f'A: {KEY}'),
  ]
  caplog.set_level(logging.DEBUG)
  seen = []
  for number, act in enumerate(echoes):
    with serving(lambda *_, act=act: act) as server:
      try:
        text = ('{% set otherwise = 0 %}' if number == 6 else '') + PAIR
        f = judge(make(server, text, key=KEY, manner=HASTY._replace(retries=1)))
        seen.append(repr(f.wins(prompts(str(number)), responses('a'), responses('b'))))
      except JudgeError as error:
        while error is not None:
          seen.append(f'{error!r} {error}')
          error = error.__cause__ or error.__context__
  assert len(seen) > len(echoes) and any('[key]' in text for text in seen)
  assert server.log[0][1]['Authorization'] == f'Bearer {KEY}'  # it was there to be found
  files = b''.join(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
  assert b'[key]' in files
  written = [*seen, caplog.text, *map(str, capfd.readouterr()), files.decode('latin-1')]
  for text in written:
    assert 'secret' not in text and KEY[:8] not in text


@pytest.mark.parametrize(
  ('variable', 'value', 'said'),
  [
    ('JUDGE_KEY', None, 'names JUDGE_KEY, which is not set'),
    ('JUDGE_KEY', '  \n', 'names JUDGE_KEY, which is not set'),
    ('JUDGE_KEY', 'sk-very secret', 'JUDGE_KEY is no API key'),
    ('JUDGE_KEY', 'sk-secret\x07', 'JUDGE_KEY is no API key'),
    ('sk-secret', None, 'must be the name of an environment variable'),
  ],
)
def test_a_key_that_cannot_be_right_is_refused_unseen(monkeypatch, variable, value, said):
  monkeypatch.delenv('JUDGE_KEY', raising=False)
  if value is not None:
    monkeypatch.setenv('JUDGE_KEY', value)
  with pytest.raises(ValueError, match=said) as caught:
    remote.key_from(variable)
  assert 'secret' not in str(caught.value)


def test_the_key_is_what_the_variable_holds(monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', f'{KEY}\n')
  assert remote.key_from('JUDGE_KEY') == KEY and remote.key_from(None) is None


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('given', 'url'),
  [
    ('http://h:8000', 'http://h:8000/v1/chat/completions'),
    ('http://h:8000/', 'http://h:8000/v1/chat/completions'),
    ('https://h/v1/', 'https://h/v1/chat/completions'),
    ('https://h/v1beta/openai', 'https://h/v1beta/openai/chat/completions'),
    ('https://h/x/chat/completions', 'https://h/x/chat/completions'),
  ],
)
def test_addresses(given, url):
  assert remote.address(given) == url


@pytest.mark.parametrize(
  'given', ['h:8000', 'ftp://h', 'http://', 'http://h:x', 'http://me:secret@h', 'http://h?k=secret']
)
def test_other_addresses_are_refused(given):
  with pytest.raises(ValueError, match=r'^judge\.endpoint ') as caught:
    remote.address(given)
  assert 'secret' not in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'concurrency': 0}, r'judge\.concurrency must be at least 1, got 0'),
    ({'retries': -1}, r'judge\.retries must be at least 0, got -1'),
    ({'timeout': 0.0}, r'judge\.timeout must be above 0 seconds, got 0\.0'),
    ({'deadline': math.nan}, r'judge\.deadline must be above 0 seconds, got nan'),
  ],
)
def test_a_manner_that_asks_nothing_is_refused(change, said):
  with pytest.raises(ValueError, match=said):
    remote.check(remote.Manner(**change))


@pytest.mark.parametrize('name', rubric.names())
def test_our_rubrics(name):
  found = rubric.read(name)
  asked = ('<P>', '<ONE>', '<TWO>')[: 3 if found.pairwise else 2]
  system, user = found.messages(*asked)
  assert system['role'] == 'system' and all(text in user['content'] for text in asked)
  assert found.pairwise == (name == 'pairwise') and len(found.answers) == (
    2 if found.pairwise else 9
  )


ANSWERS = "{% set answers = {'A': 1, 'B': 0} %}"
TEXTS = '{{ prompt }}{{ first }}{{ second }}'


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    (ANSWERS + '{{ prompt }}{{ first }}', r"reads \['first', 'prompt'\]; it must read prompt and"),
    (ANSWERS + TEXTS + '{{ response }}', 'it must read prompt and response, or'),
    (ANSWERS + TEXTS + '{{ other }}', 'it must read'),
    (ANSWERS + TEXTS + '\n{% if %}', 'rubric r, line 2: '),
    (ANSWERS + TEXTS + '{{ 1 / 0 }}', 'ZeroDivisionError'),
    (ANSWERS + TEXTS + "{{ ''.__class__.mro() }}", 'SecurityError'),
    (ANSWERS + TEXTS + "{% include '/etc/passwd' %}", 'no loader'),
    (TEXTS, 'must set two answers or more'),
    ("{% set answers = {'A': 1} %}" + TEXTS, 'must set two answers or more'),
    ("{% set answers = {'A': 1, 'AB': 0} %}" + TEXTS, "answer 'A' begins answer 'AB'"),
    ("{% set answers = {'A': 1, 'B.': 0} %}" + TEXTS, "answer 'B.' is no text without"),
    ('{% set answers = {1: 1, 2: 0} %}' + TEXTS, 'answer 1 is no text'),
    ("{% set answers = {'A': 2, 'B': 0} %}" + TEXTS, r'probability in \[0, 1\], got 2'),
    ("{% set answers = {'A': 'x', 'B': 0} %}" + TEXTS, "got 'x'"),
    (ANSWERS + '{% set otherwise = 7 %}' + TEXTS, 'otherwise must be worth a probability'),
    (ANSWERS + "{% set parameters = {'n': 2} %}" + TEXTS, 'parameters must be a mapping without'),
    (ANSWERS + '{% set parameters = 3 %}' + TEXTS, 'parameters must be a mapping without'),
    (ANSWERS + "{% set parameters = {'stop': prompt.title} %}" + TEXTS, 'parameters are no JSON'),
  ],
)
def test_a_rubric_that_makes_no_sense_is_refused_at_once(text, said):
  with pytest.raises(ValueError, match=said):
    rubric.parse(text, 'r')


def test_a_rubric_is_a_name_or_a_file(tmp_path):
  (tmp_path / 'mine.jinja').write_text(PAIR)
  assert rubric.read(str(tmp_path / 'mine.jinja')).answers == {'A': 1.0, 'B': 0.0}
  with pytest.raises(
    ValueError, match=r"'other' is no file and none of \['pairwise', 'pointwise'\]"
  ):
    rubric.read('other')
  (tmp_path / 'odd.jinja').write_bytes(b'\xff')
  with pytest.raises(ValueError, match='not UTF-8'):
    rubric.read(str(tmp_path / 'odd.jinja'))


def test_texts_are_material_and_no_template(make):
  with serving(better) as server:
    make(server)(['{{ 1 / 0 }}'], ['{% raw %}'], ['{# #}'])
  assert endpoint.texts(server.log[0][2]) == '{{ 1 / 0 }}|{% raw %}|{# #}'
