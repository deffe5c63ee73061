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
