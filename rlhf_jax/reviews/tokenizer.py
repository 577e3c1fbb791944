"""One token per word of the grammar, as a Hugging Face `tokenizers` file.

No begin token is added: every prompt opens with the same word, so there is always something to
attend to. An end token closes a response; the actor and the trainer add it, `encode` does not.
"""

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf_jax.reviews import grammar

PAD, END, UNKNOWN = '<pad>', '<end>', '<unk>'  # ids 0, 1, 2
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2


@functools.cache
def vocabulary() -> dict[str, int]:
  """Every token's id: the special ones first, then the grammar's words in order."""
  return {word: i for i, word in enumerate([PAD, END, UNKNOWN, *grammar.words()])}


def tokenizer() -> Tokenizer:
  """Words split at white space, tokens joined by one space; an unknown word becomes <unk>."""
  made = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens([PAD, END, UNKNOWN])
  return made


def write(directory: Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json into `directory`."""
  tokenizer().save(str(directory / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'pad_token': PAD,
    'eos_token': END,
    'unk_token': UNKNOWN,
    'add_bos_token': False,
    'add_eos_token': False,
    'clean_up_tokenization_spaces': False,
  }
  (directory / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
