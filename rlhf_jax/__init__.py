"""Online RLHF and Nash learning in JAX. Read `loop.py` first: one round, top to bottom."""

__version__ = '0.1.0'
