"""How a request reaches the SuperLink's inner listener: signed, for a bounded time, and failing in one line.

Source: flwr 1.41, `flwr.supercore.protobuf.client` and `flwr.supercore.retry`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClient, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.retry.retry_invoker import RetryState
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from common.errors import ConsiliumError, Interrupted
from server.endpoints import OPERATOR_HEADER, sign

_log = logging.getLogger("consilium.control")
CALL_SECONDS = 30.0
_PASSING = (502, 503, 504)

Client = TypeVar("Client", bound=ProtobufClient)


class RunEnded(Interrupted):
    """The SuperLink no longer takes anything for this run."""


class Refused(ConsiliumError):
    """The SuperLink declines a request; `code` is Flower's."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def opened(
    kind: type[Client], where: str, interceptors: Sequence[Any], patience: float | None, seconds: float = CALL_SECONDS
) -> Client:
    """Return a client of Flower's that speaks to the inner listener.

    Args:
        kind: Flower's class.
        where: host and port.
        interceptors: what is done to each request.
        patience: for how many seconds a SuperLink that does not answer is asked again; None: Flower's own way.
        seconds: that one request may take.
    """
    client = kind(
        f"http://{where}",
        interceptors=list(interceptors),
        retry_invoker=None if patience is None else _Patience(patience, where),
    )
    client._client.close()
    # A proxy named in the environment must not see the secret, nor a redirect lead it elsewhere.
    client._client = httpx.Client(trust_env=False, follow_redirects=False, timeout=seconds)
    return client


class NoAnswer(Interrupted):
    """Nobody listens, or nobody answers."""


class Operator:
    """Signs each request with the operator's secret, and says which Flower speaks."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._version = dict(RuntimeVersionMetadata.from_local_component("flwr-serverapp").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sign one request."""
        request = context.request
        claim = sign(self._secret, int(time.time()), request.url.path, request.content)
        request.headers.update({**self._version, OPERATOR_HEADER: claim})
        return call_next(context)


class _Patience(RetryInvoker):
    """Tries again for a bounded time while the SuperLink is away, and ends in one line."""

    def __init__(self, seconds: float, where: str) -> None:
        super().__init__(
            lambda: exponential(0.1, max_delay=2),
            (httpx.TransportError, httpx.HTTPStatusError),
            max_tries=None,
            max_time=seconds,
            should_giveup=is_final,
            on_backoff=self._tell,
        )
        self._where = where

    def _tell(self, state: RetryState) -> None:
        if state.tries == 1:
            _log.warning("the SuperLink at %s does not answer; waiting for it up to %.0f s", self._where, self.max_time)

    def invoke(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().invoke(target, *args, **kwargs)
        except httpx.TransportError:
            raise NoAnswer(
                f"the coordinator's SuperLink does not answer at {self._where}; start it with `consilium server up`"
            ) from None
        except httpx.HTTPStatusError as error:
            _explain(error.response, self._where)


def is_final(error: Exception) -> bool:
    """Return whether asking again would not help.

    A 500 without a word of Flower's is what a database says that is locked, or has no room, for a moment.
    """
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    if error.response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
        return FlowerError.from_json(error.response.text) is not None
    return error.response.status_code not in _PASSING


def _explain(response: httpx.Response, where: str) -> NoReturn:
    """Raise what a status means."""
    status = response.status_code
    told = FlowerError.from_json(response.text)
    if told is None and status == httpx.codes.UNAUTHORIZED:
        raise ConsiliumError(
            f"what listens at {where} does not take this operator's secret; is it another coordinator?"
        )
    if told is None:
        kind = Interrupted if status >= httpx.codes.INTERNAL_SERVER_ERROR else ConsiliumError
        raise kind(f"the SuperLink at {where} answers with status {status}; its own log says why")
    if told.code in (ApiErrorCode.RUNTIME_AUTHENTICATION_FAILED, ApiErrorCode.RUNTIME_TASK_START_FAILED):
        raise RunEnded("the SuperLink has ended this run: it was stopped, or its engine was away for too long")
    raise Refused(f"the SuperLink at {where} refuses: {told.message} ({told.code})", told.code)
