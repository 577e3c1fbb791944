"""Curves of gold reward against KL, and the numbers that they come down to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SMOOTHED = 5  # rounds of PPO that a point of its curve is the mean of
TURN = {'best_of_n': 0.01, 'ppo': 0.05}  # gold; a curve has turned this far below its peak


class Track(NamedTuple):
  """One method's way from the reference."""

  kl: np.ndarray  # f[n], nats a response, at least 0 and never falling
  halves: np.ndarray  # f[2, n], gold on one half of the prompts and on the other
  gold: np.ndarray  # f[n], on all
  proxy: np.ndarray  # f[n], 0 and 1 being mean and deviation on the reference's answers


def paths(curves: Mapping[str, Any], way: str, name: str) -> list[Track]:
  """A method's curves, of which single proxies by best-of-N have one each; rounds of PPO are
  smoothed by `SMOOTHED`."""
  if way == 'ppo':
    return [track(curves[way][name], curves[way][name]['kl'], SMOOTHED)]
  return [track(one, curves[way]['kl'], 1) for one in curves[way][name]]


def track(one: Mapping[str, Any], kl: Sequence[float], width: int) -> Track:
  """A curve whose points are means of `width` neighbours."""
  width = min(width, len(kl))

  def smooth(values: Sequence[float]) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), 'valid')

  halves = np.stack([smooth(half) for half in one['gold']])
  rising = np.maximum.accumulate(np.maximum(smooth(kl), 0))  # it is sampled
  return Track(rising, halves, halves.mean(0), smooth(one['proxy']))


def average(value: Callable[[Track], Any], tracks: Sequence[Track]) -> float:
  """The mean of a number over curves."""
  return float(np.mean([value(one) for one in tracks]))


def end(one: Track) -> float:
  """Gold where the curve ends."""
  return one.gold[-1]


def gained(one: Track) -> float:
  """What the proxy gains after gold has peaked."""
  return one.proxy[-1] - one.proxy[one.gold.argmax()]


def gold_at(kl: float | np.ndarray, one: Track) -> np.ndarray:
  """Gold at these KLs, between its points by straight lines."""
  return np.interp(kl, one.kl, one.gold)


def turn(way: str, one: Track) -> float:
  """Where gold is last within `TURN` of its peak; the end, where it never turns. In nats of
  best-of-N, and in rounds of PPO, whose every curve is of as many but goes its own way in KL."""
  at = one.kl if way == 'best_of_n' else np.arange(len(one.gold), dtype=float)
  fine = np.linspace(at[0], at[-1], 2000)
  gold = np.interp(fine, at, one.gold)
  return float(fine[gold >= gold.max() - TURN[way]][-1])


def lost(one: Track) -> float:
  """Gold lost from its peak to the end. The peak is found on one half of the prompts and the loss
  measured on the other: a peak of its own noise loses nothing."""
  halves = one.halves, one.halves[::-1]
  return float(np.mean([there[here.argmax()] - there[-1] for here, there in halves]))
