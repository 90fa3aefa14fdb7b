"""What can go wrong."""

from __future__ import annotations

import grpc


class Error(Exception):
    """What the server or the way to it says."""


class InvalidArgument(Error):
    """The request is one that is never answered."""


class NotFound(Error):
    """No such bank or cluster."""


class Blocked(Error):
    """The path that was asked for is blocked."""


class Unauthenticated(Error):
    """The server does not know who asks."""


class PermissionDenied(Error):
    """Who asks may not."""


class Busy(Error):
    """The server is at its limits, and stayed there through all tries."""


class Unavailable(Error):
    """The server, or the memory behind it, cannot be reached."""


class DeadlineExceeded(Error):
    """No answer in time."""


class ServerError(Error):
    """Any other status of gRPC."""


class ProtocolError(Error):
    """An answer that is not what it should be."""


_BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Blocked,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def of_status(address: str, error: grpc.RpcError) -> Error:
    """The error of a call."""
    code = error.code()
    kind = _BY_CODE.get(code, ServerError)
    return kind(f"{address}: {error.details()} ({code.name})")
