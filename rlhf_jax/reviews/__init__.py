"""An embedded task that needs no download: short reviews, their judges and a trained reference."""

from rlhf_jax.reviews.grammar import prompts, sample
from rlhf_jax.reviews.judges import bradley_terry, gold, raters

__all__ = ['bradley_terry', 'gold', 'prompts', 'raters', 'sample']
