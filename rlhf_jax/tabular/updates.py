"""Exact updates of a law on a game, in float64 and in logarithms: what sampled methods imitate.

Each step takes (π, P, μ, τ, s) - the law, the wins, the reference, the weight of the KL to the
reference and the step size s - and gives the next law. Under a constant step the regularised Nash
law is where OMD, EGPO and MMD rest; Nash-MD, which plays against its mixture with the reference,
needs a step that falls to 0 and is biased under a constant one.

A large constant step can cycle for ever under OMD and MMD where EGPO converges: s = 1 held on
every game tried at τ = 0.1, s = 1/τ (pure best response) on almost none.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from rlhf_jax.tabular.solvers import Law, Matrix, log_softmax, require_positive

Step = Callable[[Law, Matrix, Law, float, float], Law]


def nash_md(law: Law, wins: Matrix, reference: Law, tau: float, step_size: float) -> Law:
  """π⁺ ∝ π^μ exp(s P π^μ), π^μ ∝ π^{1−sτ} μ^{sτ} (Munos 2023, arXiv 2312.00886).

  Every step keeps KL(π*‖π⁺) ≤ (1 − sτ) KL(π*‖π) + 2s², their theorem.

  Raises:
    ValueError: sτ lies outside (0, 1], or a law has underflowed to 0.
  """
  mixed = log_softmax(_toward_reference(law, reference, tau, step_size))
  return _law(mixed + step_size * wins @ np.exp(mixed))


def omd(law: Law, wins: Matrix, reference: Law, tau: float, step_size: float) -> Law:
  """Online mirror descent, INPO's exact update: π⁺ ∝ π^{1−sτ} μ^{sτ} exp(s P π).

  Zhang 2024 (arXiv 2407.00617), whose η is 1/s: INPO's `step_weight`.

  Raises:
    ValueError: sτ lies outside (0, 1], or a law has underflowed to 0.
  """
  return _law(_toward_reference(law, reference, tau, step_size) + step_size * wins @ law)


def egpo(law: Law, wins: Matrix, reference: Law, tau: float, step_size: float) -> Law:
  """Extragradient: a half step OMD(π; Pπ), then from the *original* π a step OMD(π; P half).

  Converges linearly, as (1 − sτ)^T, for s ≤ 1/(τ + 2) (Zhou 2025, arXiv 2503.08942).

  Raises:
    ValueError: sτ lies outside (0, 1], or a law has underflowed to 0.
  """
  base = _toward_reference(law, reference, tau, step_size)
  half = _law(base + step_size * wins @ law)
  return _law(base + step_size * wins @ half)


def mmd(law: Law, wins: Matrix, reference: Law, tau: float, step_size: float) -> Law:
  """Magnetic mirror descent: π⁺ ∝ (π μ^{sτ} exp(s P π))^{1/(1+sτ)} (Sokota 2022, arXiv 2206.05825).

  Raises:
    ValueError: the step is not positive, or a law has underflowed to 0.
  """
  require_positive(step_size, 'step_size')
  pull = step_size * tau
  logits = _log(law) + pull * _log(reference) + step_size * wins @ law
  return _law(logits / (1.0 + pull))


def decreasing(tau: float) -> Callable[[int], float]:
  """t ↦ 2/(τ(t + 2)), t from 0: Nash-MD's schedule, and INPO's. The first step is sτ = 1.

  Under it KL(π*‖π_T) ≤ 8/(τ²(T + 1)) for Nash-MD (Munos 2023).
  """
  return lambda t: 2.0 / (tau * (t + 2))


def trajectory(
  step: Step,
  wins: Matrix,
  reference: Law,
  tau: float,
  step_size: float | Callable[[int], float],
  steps: int,
  start: Law | None = None,
) -> Float64[np.ndarray, 'steps+1 A']:
  """The laws of `steps` updates, row 0 being `start` (the reference when None).

  `step_size` is a number, or a function of the step's index from 0.
  """
  laws = [reference if start is None else start]
  for t in range(steps):
    size = step_size(t) if callable(step_size) else step_size
    laws.append(step(laws[-1], wins, reference, tau, size))
  return np.stack(laws)


def _toward_reference(law: Law, reference: Law, tau: float, step_size: float) -> Law:
  """(1 − sτ) log π + sτ log μ, not normalised."""
  require_positive(step_size, 'step_size')
  pull = step_size * tau
  if not 0.0 < pull <= 1.0:
    raise ValueError(f'step_size * tau must lie in (0, 1], got {step_size} * {tau} = {pull}')
  return (1.0 - pull) * _log(law) + pull * _log(reference)


def _log(law: Law) -> Law:
  if not (law > 0).all():
    raise ValueError('a law has underflowed to 0, its logarithm is lost; take a larger tau')
  return np.log(law)


def _law(logits: Law) -> Law:
  return np.exp(log_softmax(logits))
