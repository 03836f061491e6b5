"""What trainer and vLLM workers say to each other besides tensors.

| message | from | way | when |
|---|---|---|---|
| `JoinRequest` | trainer | `init_weight_transfer_engine` | once, at the handshake |
| `Joined` | each worker | receipt `joined` | once it is in the engine's group |
| `{"action": ..., "push": n}` | trainer | `update_weights` | `receive` starts a push, `check`, or `abort` ends one |
| `Staged` | each worker | receipt `staged-n` | the whole stream is there and its digests agree, or the failure |
| `Checked` | each worker | receipt `checked-n` | its model takes exactly these names and shapes, or the failure |
| `Committed` | each worker | receipt `committed-n` | the model has the weights, or the failure |

Settings that both sides share travel once, in `JoinRequest`. Receipts are authenticated by the engine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.errors import AuthenticationError, ConfigError

RECEIVE = "receive"
CHECK = "check"
ABORT = "abort"


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Invitation of a rollout to the engine's group.

    Attributes:
        engine: name of the engine.
        metadata: what the master's `prepare()` returned.
        rank_offset: rank of this rollout's first worker; its others follow.
        world_size: ranks of the group, over all rollouts, the master included.
        bucket_size: bytes of a wire bucket.
        timeout_s: seconds that one operation may take.
        verify: whether the worker compares the digest of every tensor.
        nonce: hexadecimal, fresh.
        mac: hexadecimal HMAC over all of the above with the shared token.
    """

    engine: str
    metadata: dict[str, Any]
    rank_offset: int
    world_size: int
    bucket_size: int
    timeout_s: float
    verify: bool
    nonce: str = ""
    mac: str = ""

    def signed(self, token: str) -> dict[str, Any]:
        """The request as plain values, with a fresh nonce and the MAC."""
        unsigned = msgspec.structs.replace(self, nonce=auth.nonce().hex(), mac="")
        return dict(msgspec.to_builtins(msgspec.structs.replace(unsigned, mac=unsigned._mac(token).hex())))

    def _mac(self, token: str) -> bytes:
        return auth.mac(token, "join", msgspec.json.encode(msgspec.structs.replace(self, mac=""), order="sorted"))

    @classmethod
    def opened(cls, values: dict[str, Any], token: str) -> JoinRequest:
        """Parses and checks a request on the worker.

        Raises:
            ConfigError: not a request of this version of the package.
            AuthenticationError: made with another token than this worker's.
        """
        try:
            request = msgspec.convert(values, cls)
            given = bytes.fromhex(request.mac)
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(
                f"not a join request of this version of twinkle_callbacks ({error}); "
                f"install the same version beside the trainer and beside vLLM"
            ) from None
        if not auth.verify(request._mac(token), given):
            raise AuthenticationError(
                f"the trainer has another token than this vLLM worker; give both the same {auth.TOKEN_ENV} or file"
            )
        return request


class Joined(msgspec.Struct, frozen=True):
    """What a worker runs, or why it cannot join.

    `in_update` tells that an earlier trainer left an update open, `intact` whether the model's weights are whole, that
    is that no commit broke off since the last one that did not.
    """

    model: str
    architecture: str
    hidden_size: int
    layers: int
    vocab_size: int
    dtype: str
    enable_lora: bool
    quantization: str | None
    in_update: bool
    vllm: str
    intact: bool = True


class Staged(msgspec.Struct, frozen=True):
    """A worker holds the whole stream, and its digests agree; or why not."""

    tensors: int = 0
    digest: str = ""
    failure: Failure | None = None


class Checked(msgspec.Struct, frozen=True):
    """A worker's model takes what is staged; or why not."""

    failure: Failure | None = None


class Committed(msgspec.Struct, frozen=True):
    """A worker's model has the new weights; or why not, and whether those it has are whole."""

    seconds: float = 0.0
    failure: Failure | None = None
    intact: bool = True
