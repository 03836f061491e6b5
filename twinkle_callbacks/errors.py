"""Every error this package raises on purpose, in one tree.

    TwinkleError
      ConfigError               (ValueError)       a setting is unknown, contradictory or not available
      MissingExtraError         (ImportError)      an optional dependency is not installed; names the extra
      AuthenticationError       (PermissionError)  a token is missing, unsafe or different on the other side
      DeadlineError             (TimeoutError)     an operation did not end within `timeout_s`
      SourceError               (ValueError)       the trainer's module cannot be streamed
      WeightMismatchError       (ValueError)       names or shapes differ from what the rollout serves
      DigestMismatchError       (ValueError)       bytes arrived that are not the bytes that were sent
      EngineError               (RuntimeError)     the data plane failed
        PeerError                                  ... because another rank said so; carries its cause
        ProtocolError                              ... because the bytes are not our frames
        PoisonedError                              ... earlier; this engine must be rebuilt
      RolloutError              (RuntimeError)     a rollout refused a request or does not fit the settings
        RolloutUnreachableError (ConnectionError)  ... or nobody answers at its address
      SyncError                 (RuntimeError)     a push failed; carries the phase and the rollouts
        BrokenCommitError                          ... and left rollouts unable to serve; never skipped

Each is also the standard type in brackets, takes the message as its only argument (so it pickles), and says what
happened, with which value, and what to do.
"""

from __future__ import annotations


class TwinkleError(Exception):
    """Root of all errors of this package.

    Attributes:
        rollouts: names of the rollouts concerned, empty where none is or none is known.
    """

    rollouts: tuple[str, ...] = ()


class ConfigError(TwinkleError, ValueError):
    """A setting is unknown, contradictory, or asks for what this version does not have."""


class MissingExtraError(TwinkleError, ImportError):
    """An optional dependency is missing. The message names the extra that installs it."""


class AuthenticationError(TwinkleError, PermissionError):
    """The shared token is missing, readable by others, or not the one the other side has."""


class DeadlineError(TwinkleError, TimeoutError):
    """A blocking operation outlasted its deadline."""


class SourceError(TwinkleError, ValueError):
    """The module on the trainer cannot be turned into a stream of checkpoint tensors."""


class WeightMismatchError(TwinkleError, ValueError):
    """What was sent is not what the rollout's model loads; lists missing, unexpected and differently shaped tensors."""


class DigestMismatchError(TwinkleError, ValueError):
    """The digest of a received tensor differs from the one the sender computed."""


class EngineError(TwinkleError, RuntimeError):
    """The data plane failed."""


class PeerError(EngineError):
    """Another rank of the data plane reported an error; the message carries its type and text."""


class ProtocolError(EngineError):
    """The peer speaks another protocol, another version of it, or sends out of order."""


class PoisonedError(EngineError):
    """The engine failed before. Call `finalize()`, then `prepare()` and `init_process_group()` again."""


class RolloutError(TwinkleError, RuntimeError):
    """A rollout answered with an error, or what it runs contradicts the settings."""


class RolloutUnreachableError(RolloutError, ConnectionError):
    """Nothing answers at a rollout's address."""


class SyncError(TwinkleError, RuntimeError):
    """A push failed. Rollouts that had not committed go on serving the weights they had, the others the new ones.

    Attributes:
        phase: the phase that failed: `start`, `transfer`, `check` or `commit`.
        rollouts: names of the rollouts concerned, empty when the trainer itself failed.
    """

    def __init__(self, message: str, phase: str = "", rollouts: tuple[str, ...] = ()) -> None:
        super().__init__(message, phase, rollouts)
        self.phase = phase
        self.rollouts = tuple(rollouts)

    def __str__(self) -> str:
        return str(self.args[0])


class BrokenCommitError(SyncError):
    """A commit broke off, or nobody knows how far it came: these rollouts may not serve until a push succeeds.

    Servers stay paused until then. An engine in this process cannot be stopped: do not generate with it.
    """


_BY_NAME = {cls.__name__: cls for cls in [TwinkleError]}


def _index(cls: type[TwinkleError]) -> None:
    for child in cls.__subclasses__():
        _BY_NAME[child.__name__] = child
        _index(child)


_index(TwinkleError)


def text_of(error: BaseException) -> str:
    """The error's text, never empty, with what is not Unicode (such as bytes of a file's name) escaped."""
    return (str(error) or repr(error)).encode("utf-8", "backslashreplace").decode()


def from_wire(type_name: str, message: str, default: type[TwinkleError] = PeerError) -> TwinkleError:
    """Rebuilds an error that another process described by its type's name and its text.

    Only the types above are ever built; any other name becomes `default`, with the name put before the text.
    """
    cls = _BY_NAME.get(type_name)
    if cls is None:
        return default(f"{type_name}: {message}")
    return cls(message)
