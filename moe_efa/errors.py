"""Exception classes. The native layer raises these too, built from its ``Status``."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot work, found before anything was sent."""


class ClosedError(ValueError):
    """A call on an ``ExpertParallel`` that was closed here."""


class TransportError(RuntimeError):
    """The exchange failed; the object is unusable and every later call raises the same error.

    ``rank`` is the rank in the group that is to blame, ``phase`` is ``"dispatch"`` or ``"combine"``, ``epoch`` counts
    the dispatches or combines of the group, ``chunk`` is the sequence number in its ring. Unknown fields are None.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        phase: str | None = None,
        epoch: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.epoch = epoch
        self.chunk = chunk


class PeerLostError(TransportError):
    """A peer died, closed the group, or fell silent for longer than ``heartbeat_timeout_s``."""


class PeerTimeoutError(TransportError):
    """A peer is alive but did not enter or finish the call within ``timeout_s``."""
