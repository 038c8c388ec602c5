"""Which plans are tried under a budget, and in which order: settings, decided on before any graph is seen.

What costs least time comes first, and of that the least lossy; the first that fits is taken, so that a smaller budget
can never lead to a larger peak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from slimfit_fx.config import Config
from slimfit_fx.planning.sensitivity import held_bytes, loses_less, maps_between
from slimfit_fx.presets import LOSSLESS_PRESETS, RECOMPUTE_SHARES

_WEAKER = {"exact": (), "paper": ("exact",), "balanced": ("exact",), "max": ("exact", "balanced")}
"""Presets that lose less than the one asked for, the most exact first."""
_MIXED = 2
"""How many maps are tried between two presets."""
_NUMBERS_TRIED = 3
"""Between two shares of the blocks, how many numbers of blocks are tried."""


def candidates(config: Config) -> list[Config]:
    """What is tried under a budget, in order: what costs least time first, and of that the least lossy.

    Codecs that the preset allows come before running products again, which costs time in every step, at first in a part
    of the blocks and with the last codecs only, to save dry runs; whole blocks are run again only if nothing else fits.
    That is what ``recompute="auto"`` comes to here.
    """
    plain = dataclasses.replace(config, recompute="cheap", recompute_share=1.0)
    settings = _by_error(plain)
    return [
        dataclasses.replace(one, recompute=level, recompute_share=share)
        for level, share in _recompute_steps(config)
        for one in (settings if share == 1 else settings[-1:])
    ]


def _recompute_steps(config: Config) -> list[tuple[str, float]]:
    """Levels of recompute and shares of the blocks, from what the user set on, in rising order of what runs again."""
    steps = [(level, share) for level, shares in RECOMPUTE_SHARES.items() for share in shares]
    if config.recompute == "auto":
        return steps
    own = (config.recompute, config.recompute_share)
    order = list(RECOMPUTE_SHARES)
    return [own, *(s for s in steps if (order.index(s[0]), s[1]) > (order.index(own[0]), own[1]))]


def between(tried: Sequence[Config], config: Config, blocks: int) -> list[Config]:
    """Settings between ``config``, one of ``tried``, and what precedes it with the same codecs: fewer blocks run again.

    ``blocks``: how many the model has. A few, spread evenly over their numbers, fewest blocks first; none where the two
    differ in more than that. What they are does not depend on the budget.
    """
    alike = [one for one in tried[: tried.index(config)] if _same_codecs(one, config)]
    if not alike or alike[-1].recompute not in ("cheap", config.recompute):
        return []
    least = 0.0 if alike[-1].recompute == "cheap" else alike[-1].recompute_share
    numbers = range(math.floor(least * blocks + 1e-9) + 1, math.ceil(config.recompute_share * blocks - 1e-9))
    count = min(_NUMBERS_TRIED, len(numbers))
    chosen = [numbers[(k + 1) * len(numbers) // (count + 1)] for k in range(count)]
    return [dataclasses.replace(config, recompute_share=number / blocks) for number in chosen]


def place_of(config: Config, tried: Sequence[Config]) -> int:
    """Where ``config`` stands in ``tried``; of settings in between, where those stand that come next."""
    if config in tried:
        return tried.index(config)
    later = (
        i
        for i, one in enumerate(tried)
        if one.recompute == config.recompute and one.recompute_share >= config.recompute_share
    )
    return next(i for i in later if _same_codecs(tried[i], config))


def _same_codecs(one: Config, other: Config) -> bool:
    return (one.preset, one.codec_map) == (other.preset, other.codec_map)


def _by_error(config: Config) -> list[Config]:
    """Milder settings and then ``config``: by the error to expect, and of those with the same codecs only the last."""
    weaker = [_weaker(config, name) for name in _WEAKER[config.preset]]
    mixed = _between(weaker[-1], config) if weaker and weaker[-1].preset not in LOSSLESS_PRESETS else []
    different = {tuple(one.codec_map.items()): one for one in (*weaker, *mixed, config)}
    return sorted(different.values(), key=_error_or_most)


def _error_or_most(config: Config) -> float:
    error = config.expected_gradient_error
    return math.inf if error is None else error


def _weaker(config: Config, preset: str) -> Config:
    """``config`` with another preset, and the user's own codecs where they lose less than it does."""
    plain = dataclasses.replace(config, preset=preset, codecs=None)
    mine = config.codecs or {}
    milder = {kind: codec for kind, codec in mine.items() if loses_less(kind, codec, plain.codec_map[kind])}
    return dataclasses.replace(plain, codecs=milder or None)


def _between(lower: Config, upper: Config) -> list[Config]:
    """A few settings whose codecs are partly those of ``lower``, spread evenly over the bytes between the two.

    More would serve a budget more closely, but each costs a dry run.
    """
    maps = maps_between(lower.codec_map, upper.codec_map)
    sizes = [held_bytes(codecs) for codecs in maps]
    least, most = held_bytes(upper.codec_map), held_bytes(lower.codec_map)
    wanted = [least + (most - least) * k / (_MIXED + 1) for k in range(1, _MIXED + 1)]
    nearest = {min(range(len(maps)), key=lambda i, w=w: abs(sizes[i] - w)) for w in wanted} if maps else set()  # type: ignore[misc]
    return [upper.with_codecs(maps[i]) for i in nearest]
