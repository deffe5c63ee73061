"""Counter-based random numbers keyed by what they are for.

Every draw of the data path comes from a Philox-4x64 generator (Salmon et al., SC 2011) whose key is a hash of the draw's purpose and place. Nothing depends on
which process makes the draw, nor on how many were made before. Only raw 64-bit outputs are used: NumPy keeps those stable between releases, while the
methods of ``Generator`` may change.
"""

import hashlib
import json

import numpy as np


def keyed_philox(*key: int | str) -> np.random.Philox:
    """A Philox generator whose 128-bit key is the BLAKE2b hash of ``key``."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed for generators that are not ours (``torch.manual_seed``), from the same hash."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest(), "little") >> 1


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A uniform permutation of ``range(n)``, int64 [n]: the order of n raw draws."""
    return np.argsort(keyed_philox(*key).random_raw(n), kind="stable") if n else np.zeros(0, np.int64)


def uniforms(raw: np.ndarray) -> np.ndarray:
    """Raw uint64 draws as float64 in [0, 1), 53 bits each."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Shuffle:
    """A pseudo-random permutation of ``range(n)`` that gives any of its values without holding the others.

    Up to 2^20 values it is ``permutation``, uniform over all orders. Above, it is a Feistel network of 8 rounds over the next even power of two
    (Luby and Rackoff 1988), walked until the value falls into the range (Black and Rogaway 2002): no memory, and as good as uniform at that size.
    """

    def __init__(self, n: int, *key: int | str):
        self.n = n
        self._table: np.ndarray | None = None
        if n <= 1 << 20:
            self._table = permutation(n, *key)
            return
        self._half = np.uint64(((n - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = keyed_philox(*key).random_raw(8)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """The values at ``index`` (int64 [K], each in [0, n)), int64 [K]."""
        if self._table is not None:
            return self._table[index]
        out = self._walk(index.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while len(outside):
            out[outside] = self._walk(out[outside])
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64)

    def _walk(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            # The finaliser of MurmurHash3: each bit of its input moves each bit of its output.
            mixed = right ^ key
            for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
                mixed = mixed ^ (mixed >> np.uint64(33))
                mixed *= factor
            mixed ^= mixed >> np.uint64(33)
            left, right = right, (left ^ mixed) & self._mask
        return (left << self._half) | right
