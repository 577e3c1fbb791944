"""What an offline objective learns from where no file brings responses: drawn once, judged, kept.

The reference answers every training prompt, neighbours among its answers are compared, and the rows
stand in `<workdir>/dataset.jsonl`, in the form that a file of one's own has. A run that resumes
reads them there again.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax import actor, distributed, experience, players, prompts, recordings, setups
from rlhf_jax.judges import texts
from rlhf_jax.tokens import Tokenizer
from rlhf_jax.types import Array, Params, Prompts, Recording, Responses

FILE = 'dataset.jsonl'


def check(training: Sequence[prompts.Row], *, pairs: bool) -> None:
  """Refuse, before anything is compiled, responses of another kind than the objective learns from.

  Raises:
    ValueError: see `recordings.check`.
  """
  came = {row.place: row.told for row in training if row.told is not None}
  recordings.check(list(came.values()), list(came), pairs=pairs)


def recorded(
  workdir: Path,
  training: Sequence[prompts.Row],
  tokenizer: Tokenizer,
  draw: Callable[[], Iterator[dict]],
  *,
  max_tokens: int,
) -> tuple[list[prompts.Row], Callable[[Sequence[int]], Recording]]:
  """Rows with responses, as they came or else from the work directory's file, and their recorder.

  The file is written whole, or not at all.

  Raises:
    ValueError: see `recordings.recorder`.
  """
  found = list(training)
  if found[0].told is None:
    path = workdir / FILE
    if distributed.agreed(not path.is_file()):
      text = ''.join(json.dumps(row) + '\n' for row in draw())
      if distributed.first():
        workdir.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        part.write_text(text, encoding='utf-8')
        os.replace(part, path)
      distributed.barrier(FILE)
    found = prompts.read(path, recorded=True)
  told = [row.told for row in found if row.told is not None]
  asked = [prompts.as_text(row) for row in found]
  places = [row.place for row in found]
  return found, recordings.recorder(told, places, asked, tokenizer, max_tokens=max_tokens)


def drawn(
  setup: setups.Setup,
  reference: Params,
  training: Sequence[prompts.Row],
  serve: Callable[[list[prompts.Row]], Sequence[Prompts]],
  tokenizer: Tokenizer,
  *,
  pairs: int,
  seed: int,
  max_tokens: int,
) -> Iterator[dict]:
  """Rows of JSON: `pairs` pairs of the reference's answers to each prompt.

  Soft labels, P(chosen beats rejected) by the run's judge. Where the objective learns from
  demonstrations, the better one of each pair is one. A pair of which one does not read back into
  `max_tokens` tokens is left out. `serve` makes whole batches; what fills the last is not written.

  Raises:
    JudgeError: see the judge.
  """
  key, decode = actor.role_key(jax.random.key(seed), 'dataset'), texts.decoder(tokenizer)
  compared = setup.objective._replace(
    behaviour=players.REFERENCE, opponent=players.SIBLINGS, judged=True, select=neighbours
  )
  left = len(training)
  for batch in serve(list(training)):
    own = setup.sample(
      {'reference': reference},
      players.REFERENCE,
      batch.tokens,
      batch.attended,
      batch.ordinals,
      key,
      setup.settings,
      responses=2 * pairs,
    )
    _, wins, _ = experience.judge_round(setup.judging, compared, batch, own, own)
    asked, own, labels = distributed.fetched((batch._replace(texts=None), own, wins))
    answers = decode(asked, own)
    for b, prompt in enumerate((batch.texts or ())[:left]):
      fits = [len(tokenizer.response(prompt, text)) <= max_tokens for text in answers[b]]
      for n in range(0, 2 * pairs, 2):
        label, pair = float(labels[b, n, n + 1]), answers[b][n : n + 2]
        if not (fits[n] and fits[n + 1]):
          continue
        chosen, rejected = pair if label >= 0.5 else pair[::-1]
        row = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
        if setup.objective.judged:
          yield {**row, 'preference': max(label, 1 - label)}
        else:
          yield {'prompt': prompt, 'response': chosen}
    left -= len(batch.texts or ())


def neighbours(
  stage: int, own: Responses, opponent: Responses, wins: Array, judged: Array
) -> Array:
  """The comparisons of responses 0 and 1, 2 and 3, ..."""
  del own, opponent, judged
  first = jnp.arange(wins.shape[1])[:, None]
  plan = (first % 2 == 0) & (jnp.arange(wins.shape[2])[None] == first + 1) & (stage == 0)
  return jnp.broadcast_to(plan, wins.shape)
