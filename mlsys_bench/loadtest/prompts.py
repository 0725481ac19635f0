"""Prompts of a given length in characters: seeded text of made-up words, every prompt from another place, so that no prefix is shared."""

from __future__ import annotations

import random

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_POOL_WORDS = 30_000


class Text:
    """A pool of seeded text that prompts are cut from."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self._pool = " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(_POOL_WORDS))
        self._seed = seed

    def prompt(self, index: int, chars: int) -> str:
        """Return the prompt of one request: `chars` letters and spaces, the first word its own number."""
        start = (index * 7919 + self._seed * 104_729) % len(self._pool)
        text = f"{_letters(index)} {self._pool[start : start + chars]}"
        while len(text) < chars:
            text += self._pool
        return text[:chars]


def _letters(number: int) -> str:
    """Write a number in five syllables, the fastest-changing first, so that short prompts differ too."""
    base = len(_SYLLABLES)
    return "".join(_SYLLABLES[number // base**place % base] for place in range(5))
