"""The only source of the randomness that privacy rests on: ChaCha20 under a key that nobody chose and nothing keeps.

Noise that can be predicted is none, and a draw that can be predicted amplifies nothing. So these numbers come from no
generator of torch or numpy (their state can be recovered from their output) and from no seed: `Noise` takes none, and
is neither copied nor stored.

Floating-point numbers are the other way in. A Gaussian made of them has gaps, which differ between `total + noise` and
`other + noise`, so that the last bits of a result can say which total it was (Mironov 2012 for Laplace; Holohan and
Braghin 2021, Haney et al. 2022 for the Gaussian). `add_noise` sums in float64 and rounds the sum to multiples of a
power of two near std · 2⁻²⁰, which depends on std alone: each multiple then collects some 2³⁰ of the sums that were
possible, where the noise is likely at all, whatever the total, and what float32 drops afterwards is a function of the
multiple. It costs std² · 2⁻⁴² / 12 of variance at most. This closes the known attacks; it is no proof, for which noise
would have to be drawn on the integers (Canonne et al. 2020).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

PART = 2**17
"""Words at a time: what is made of them stays in the cache of a core."""

LIFE = 2**30
"""Words under one key: ChaCha20 counts blocks of eight words in 32 bits."""

GRID_BITS = 20
"""The grid is finer than the noise by this power of two at least."""

_ZEROS = bytes(8 * PART)


class Noise:
    """A stream of random numbers, its key from the operating system; a forked process goes on with a key of its own.

    ChaCha20 and AES in counter mode take the same time on machines with instructions for AES (4 to 5 GB/s, a fifth of
    the time of Gaussian noise), and ChaCha20 needs none.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._left = LIFE
        algorithm = algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12))  # four bytes count blocks, from 0
        self._cipher: CipherContext = Cipher(algorithm, None).encryptor()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse: whoever has a copy knows the noise."""
        raise TypeError("Noise cannot be copied or stored: a second stream of the same numbers takes the noise away")

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Return Gaussian numbers, float64.

        Box and Muller: sqrt(-2 ln u) · (cos, sin)(2π v), u in (0, 1] of 53 bits, so none is beyond 8.6 std, where one
        in 10¹⁷ would be.
        """
        values = torch.empty(math.prod(shape), dtype=torch.float64)
        for part in _parts(values):
            half = (len(part) + 1) // 2
            uniform = self._uniform(2 * half)
            radius = uniform[:half].log_().mul_(-2).sqrt_().mul_(std)
            angle = uniform[half:].mul_(2 * math.pi)
            torch.mul(radius, angle.cos(), out=part[:half])
            torch.mul(radius[: len(part) - half], angle[: len(part) - half].sin_(), out=part[half:])
        return values.reshape(tuple(shape))

    def laplace(self, shape: Sequence[int], scale: float) -> Tensor:
        """Return numbers of density exp(-|x| / scale) / (2 scale), float64."""
        values = torch.empty(math.prod(shape), dtype=torch.float64)
        for part in _parts(values):
            words = self._words(len(part))
            sign = 1 - 2 * (words & 1)  # a bit that `_open` leaves out
            torch.mul(_open(words).log_().mul_(-scale), sign, out=part)
        return values.reshape(tuple(shape))

    def chosen(self, count: int, rate: float) -> Tensor:
        """Return which of `count` a Poisson draw takes, each by itself with probability `rate`: (n,) of int64, rising.

        Raises:
            ValueError: a rate outside 0 to 1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: got {rate}, expected 0 to 1")
        if rate == 1:
            return torch.arange(count)
        threshold = int(rate * 2**64) - 2**63  # exact: a product with a power of two; words are signed
        return torch.nonzero(self._words(count) < threshold).squeeze(1)

    def below(self, counts: Tensor) -> Tensor:
        """Return a whole number from 0 up to each count, itself left out: int64.

        floor(u · count) with u in [0, 1) of 53 bits: no value is more likely than another by more than count · 2⁻⁵³.
        """
        uniform = (self._words(counts.numel()) >> 11 & (2**53 - 1)).double().mul_(2.0**-53)
        return (uniform.reshape(counts.shape) * counts).long()

    def _uniform(self, count: int) -> Tensor:
        return _open(self._words(count))

    def _words(self, count: int) -> Tensor:
        """Return 64 random bits each, as int64."""
        if self._process != os.getpid() or self._left < count:
            self._renew()
        self._left -= count
        content = bytearray(8 * count)
        view = memoryview(content)
        for start in range(0, 8 * count, len(_ZEROS)):
            into = view[start : start + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(into)], into)
        return torch.frombuffer(content, dtype=torch.int64) if count else torch.empty(0, dtype=torch.int64)


def _open(words: Tensor) -> Tensor:
    """Return numbers in (0, 1] from the upper 53 of 64 bits."""
    return (words >> 11 & (2**53 - 1)).double().add_(1).mul_(2.0**-53)


def _parts(values: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(values, PART)) if len(values) else iter(())


def grid(std: float) -> float:
    """Return the largest power of two that is at most std · 2⁻²⁰.

    Examples:
        >>> grid(1.0) == 2.0**-20, grid(1.5) == 2.0**-20, grid(0.9) == 2.0**-21
        (True, True, True)
    """
    return 2.0 ** (math.frexp(std)[1] - 1 - GRID_BITS)


def add_noise(total: Tensor, std: float, noise: Noise) -> Tensor:
    """Return total + N(0, std²) on the grid of `std`, float32 on the total's device; the total itself at std 0."""
    if std == 0:
        return total.float()
    step = grid(std)
    noisy = noise.normal(total.shape, std).to(total.device).add_(total)
    return noisy.div_(step).round_().mul_(step).float()
