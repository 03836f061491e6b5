"""What trainer and vLLM workers say to each other besides tensors.

| message | from | way | when |
|---|---|---|---|
| `JoinRequest` | trainer | `init_weight_transfer_engine` | once, at the handshake |
| `Joined` | each worker | receipt `joined` | once it is in the engine's group |
| `Staged` | each worker | receipt `staged-n` | the whole stream is there and its digests agree, or the failure |

Whole weights go through vLLM's update session, which stops the engine for the commit and drops all adapters:

| `{"action": ..., "push": n}` | trainer | `update_weights` | `receive` starts a push, `check`, or `abort` ends one |
| `Checked` | each worker | receipt `checked-n` | its model takes exactly these names and shapes, or the failure |
| `Committed` | each worker | receipt `committed-n` | the model has the weights, or the failure |

An adapter alone needs no session; each trainer's has its own link to the workers:

| `AdapterCall` | trainer | `init_weight_transfer_engine` | `receive` starts a push, `compare` the base, `leave` |
| `Compared` | each worker | receipt `compared-n` | which of the base's tensors differ from the trainer's |

Settings that both sides share travel once, in `JoinRequest`. Receipts are authenticated by the engine.
"""

from __future__ import annotations

from typing import Any, Self

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.whereabouts import Whereabouts
from twinkle_callbacks.errors import AuthenticationError, ConfigError

RECEIVE = "receive"
CHECK = "check"
ABORT = "abort"
COMPARE = "compare"
LEAVE = "leave"


class _SignedMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message that only a holder of the token can make.

    Attributes:
        tenant: name of the tenant that signed it, empty for a holder of the server's token.
        nonce: hexadecimal, fresh.
        mac: hexadecimal HMAC over all other fields with the sender's token.
    """

    tenant: str = ""
    nonce: str = ""
    mac: str = ""

    def signed(self, token: str) -> dict[str, Any]:
        """The message as plain values, with a fresh nonce and the MAC."""
        tenant, fresh = auth.tenant_of(token), auth.nonce().hex()
        unsigned = msgspec.structs.replace(self, tenant=tenant, nonce=fresh, mac="")
        return dict(msgspec.to_builtins(msgspec.structs.replace(unsigned, mac=unsigned._mac(token).hex())))

    def _mac(self, token: str) -> bytes:
        unsigned = msgspec.structs.replace(self, mac="")
        return auth.mac(token, type(self).__name__, msgspec.json.encode(unsigned, order="sorted"))

    @classmethod
    def opened(cls, values: dict[str, Any], token: str) -> Self:
        """Parses and checks a message on the worker, whose token is the server's.

        Raises:
            ConfigError: not a message of this version of the package.
            AuthenticationError: made with another token than this worker's, or not the tenant's to send.
        """
        try:
            message = msgspec.convert(values, cls)
            given, expected = bytes.fromhex(message.mac), message._mac(auth.key_of(token, message.tenant))
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(
                f"not a {cls.__name__} of this version of twinkle_callbacks ({error}); "
                f"install the same version beside the trainer and beside vLLM"
            ) from None
        if not auth.verify(expected, given):
            raise AuthenticationError(
                f"the trainer has another token than this vLLM worker; give both the same {auth.TOKEN_ENV} or file"
            )
        if message.tenant and not (message.touches and auth.may_touch(message.tenant, message.touches)):
            what = f"adapter {message.touches!r}" if message.touches else "whole weights"
            raise AuthenticationError(
                f"tenant {message.tenant!r} may not sync {what}; its adapters are {message.tenant!r} and those "
                f"under {message.tenant + '/'!r}"
            )
        return message

    @property
    def touches(self) -> str:
        """The adapter that this is about, empty for whole weights."""
        raise NotImplementedError


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter as its trainer describes it before any of it is sent.

    Attributes:
        name: the model name that requests give to be answered with it.
        config: what PEFT writes into `adapter_config.json`.
        shapes: full shape of each tensor, by its name in `adapter_model.safetensors`.
    """

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


class JoinRequest(_SignedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Invitation of a rollout to the engine's group.

    Attributes:
        engine: name of the engine.
        metadata: what the master's `prepare()` returned.
        rank_offset: rank of this rollout's first worker; its others follow.
        world_size: ranks of the group, over all rollouts, the master included.
        bucket_size: bytes of a wire bucket.
        timeout_s: seconds that one operation may take.
        verify: whether the worker compares the digest of every tensor.
        client: of the synchronizer that invites, random; tells one that comes again from another one.
        adapter: the adapter that will be sent; None for whole weights.
        base_of: with whole weights: the adapter that they are the base of, which may not be replaced beneath others;
            empty where it may.
    """

    engine: str
    metadata: dict[str, Any]
    rank_offset: int
    world_size: int
    bucket_size: int
    timeout_s: float
    verify: bool
    client: str = ""
    adapter: Adapter | None = None
    base_of: str = ""

    @property
    def touches(self) -> str:
        return self.adapter.name if self.adapter is not None else ""


class AdapterCall(_SignedMessage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the trainer of an adapter asks of each worker, once they are in one group.

    Attributes:
        action: `receive`, `compare` or `leave`.
        adapter: its name; empty for `leave` of who sends whole weights.
        client: that of the `JoinRequest`, so that what comes late leaves the link of the next trainer alone.
        number: of the push or the comparison; its receipt is `staged-<number>` or `compared-<number>`.
        path: of the version to receive, as `AdapterPath` writes it.
        base: to compare: dtype and XXH3-64 digest (hexadecimal) of each tensor of the base, by its name.
    """

    action: str
    adapter: str
    client: str = ""
    number: int = 0
    path: str = ""
    base: dict[str, tuple[str, str]] = {}

    @property
    def touches(self) -> str:
        return self.adapter


class LoRARuns(msgspec.Struct, frozen=True):
    """How a worker runs LoRA, and why it cannot serve the adapter that the trainer wants to send, if it cannot.

    `base_id` is random, made when the worker begins and anew at each commit of whole weights: another id, another base.
    """

    max_loras: int
    max_lora_rank: int
    dtype: str
    base_id: str = ""
    refusal: Failure | None = None


class Joined(msgspec.Struct, frozen=True):
    """What a worker runs, or why it cannot join.

    `in_update` tells that an earlier trainer left an update open, `intact` whether the model's weights are whole, that
    is that no commit broke off since the last one that did not. `lora` is None where LoRA is off. `quantization` names
    one that cannot be synced.
    """

    model: str
    architecture: str
    hidden_size: int
    layers: int
    vocab_size: int
    dtype: str
    lora: LoRARuns | None
    quantization: str | None
    in_update: bool
    vllm: str
    intact: bool = True
    whereabouts: Whereabouts = Whereabouts()


class Staged(msgspec.Struct, frozen=True):
    """A worker holds the whole stream, and its digests agree; or why not.

    `base_id` is that of `LoRARuns`, at that time. `fits` tells that the model took the same before, so that no check
    is needed.
    """

    tensors: int = 0
    digest: str = ""
    failure: Failure | None = None
    base_id: str = ""
    fits: bool = False


class Compared(msgspec.Struct, frozen=True):
    """Names of the base's tensors that a worker has with other values or not at all; or why it cannot tell.

    `base_id` is that of the base that was compared, `others` the adapters on it except the trainer's own: loaded, or
    kept fresh by a trainer.
    """

    differing: list[str] = []
    failure: Failure | None = None
    base_id: str = ""
    others: list[str] = []


class Checked(msgspec.Struct, frozen=True):
    """A worker's model takes what is staged; or why not."""

    failure: Failure | None = None


class Committed(msgspec.Struct, frozen=True):
    """A worker's model has the new weights; or why not, and whether those it has are whole."""

    seconds: float = 0.0
    failure: Failure | None = None
    intact: bool = True
