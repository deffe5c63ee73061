"""Where the ranks of a doctor's job meet: the rendezvous' key-value store, with a deadline on every wait."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mlm_dist.distributed import Topology, meeting_point

# Beyond its own deadline, what another rank is given to say that it met its deadline.
GRACE_S = 10.0
_LOOK_S = 0.1


class Unreachable(Exception):
    """This rank cannot reach rank 0, or rank 0 has gone."""


class Meeting:
    """The store, joined.

    Args:
        topology: this rank's.
        wait_s: seconds that the ranks have to come.

    Raises:
        UserError: several ranks and no MASTER_ADDR or MASTER_PORT.
        Unreachable: rank 0 cannot be reached, or cannot listen.
    """

    def __init__(self, topology: Topology, wait_s: float) -> None:
        self.topology, self.wait_s = topology, wait_s
        self.store: dist.Store = dist.HashStore()
        if topology.world_size > 1:
            self.store = dist.PrefixStore("doctor", self._connect())

    def _connect(self) -> dist.Store:
        host, port = meeting_point(self.topology)
        # torchrun listens at that port itself, and its ranks are all guests.
        listens = self.topology.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            return dist.TCPStore(
                host,
                port,
                is_master=listens,
                timeout=timedelta(seconds=self.wait_s),
                wait_for_workers=False,  # they are waited for by name
            )
        except (RuntimeError, OSError) as error:
            what = "rank 0 cannot listen at" if listens else "cannot reach rank 0 at"
            raise Unreachable(f"{what} {host}:{port} ({str(error).splitlines()[0]})") from error

    def introduce(self, card: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
        """(cards of the ranks that came, in rank order; the ranks that did not come in time), the same on every rank.

        Raises:
            Unreachable: rank 0 has gone.
        """
        self.tell("card", card)
        if self.topology.rank == 0:
            cards = self.collect("card", self.wait_s)
            self.publish("cards", cards)
        else:
            cards = self.read("cards", self.wait_s + GRACE_S)
        return [one for one in cards if one is not None], [rank for rank, one in enumerate(cards) if one is None]

    def tell(self, key: str, content: Any) -> None:
        """Leave this rank's content for rank 0."""
        self.publish(f"{key}/{self.topology.rank}", content)

    def publish(self, key: str, content: Any) -> None:
        """Leave content that is read by `read`."""
        try:
            self.store.set(key, json.dumps(content))
        except RuntimeError as error:
            raise Unreachable(f"rank 0 has gone ({str(error).splitlines()[0]})") from error

    def leave(self, ranks: Sequence[int]) -> None:
        """Go, rank 0 after these ranks: with it goes the store, from which they may still be reading."""
        if self.topology.rank == 0:
            self.collect("bye", GRACE_S, ranks)
        else:
            with contextlib.suppress(Unreachable):
                self.tell("bye", True)

    def collect(self, key: str, seconds: float, ranks: Sequence[int] | None = None) -> list[Any]:
        """What the ranks (all by default) told under `key`; None for those that did not within so many seconds, all together."""
        deadline = time.monotonic() + seconds
        found: list[Any] = []
        for rank in range(self.topology.world_size) if ranks is None else ranks:
            try:
                found.append(self.read(f"{key}/{rank}", max(0.01, deadline - time.monotonic())))
            except Unreachable:
                found.append(None)
        return found

    def read(self, key: str, seconds: float) -> Any:
        """The content of `key`. Raises Unreachable when it is not there in time."""
        try:
            if self.topology.rank == 0:
                self._look_for(key, seconds)
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise Unreachable(f"no word from rank 0 about {key!r} within {seconds:.0f} s") from error

    def _look_for(self, key: str, seconds: float) -> None:
        """Wait as rank 0, whose store is its own: by looks, between which a signal is heard, as it is not within the store's wait."""
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise Unreachable(f"nothing was told about {key!r} within {seconds:.0f} s")
            time.sleep(_LOOK_S)
