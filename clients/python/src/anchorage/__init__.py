"""Memory of an Anchorage server or of files: paths of texts, and blocks of parameters on them.

`Client` asks a server, `BankFile` reads an exported bank; `anchorage.torch` adds what they answer to a PyTorch model.
"""

from .bank import BankFile, Tree
from .client import Client, Retry, Tls
from .errors import (
    Blocked,
    Busy,
    DeadlineExceeded,
    Error,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ProtocolError,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from .hashed import Hashed
from .types import (
    GENERIC,
    Bank,
    Block,
    Cluster,
    Example,
    Explained,
    Info,
    Path,
    Retrieved,
    Route,
    Spec,
    Term,
    format_path,
    parse_path,
)

__all__ = [
    "GENERIC",
    "Bank",
    "BankFile",
    "Block",
    "Blocked",
    "Busy",
    "Client",
    "Cluster",
    "DeadlineExceeded",
    "Error",
    "Example",
    "Explained",
    "Hashed",
    "Info",
    "InvalidArgument",
    "NotFound",
    "Path",
    "PermissionDenied",
    "ProtocolError",
    "Retrieved",
    "Retry",
    "Route",
    "ServerError",
    "Spec",
    "Term",
    "Tls",
    "Tree",
    "Unauthenticated",
    "Unavailable",
    "format_path",
    "parse_path",
]
