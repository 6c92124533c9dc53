"""Whether a Ray cluster answers at an address: asked first, since Ray itself tries for long."""

import re
import socket
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from supsup.errors import UserError, one_line, shown

SECONDS = 5.0
_MESSAGES: Any = gcs_service_pb2
_SERVICES: Any = gcs_service_pb2_grpc
_PLACE = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")
_START = "start one with ray start --head, or leave --address out"
_TOKEN = "give the cluster's own by RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token, at mode 0600"


def check_reachable(address: str) -> str:
    """Check that a cluster of this version answers and takes the token; return HOST:PORT.

    Args:
        address: "auto", or HOST:PORT.

    Raises:
        UserError: if nobody answers in a few seconds, no Ray does, it refuses the token, or it is
            of another version.
    """
    place = _resolved(address)
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
        reply = _ask(place)
    except OSError as error:
        raise UserError(
            f"no Ray cluster at {shown(address)} ({one_line(error)}); {_START}"
        ) from None
    except AuthenticationError:
        raise UserError(f"there is no token for the Ray cluster at {place}; {_TOKEN}") from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            problem = f"the Ray cluster at {place} refuses the token; {_TOKEN}"
            raise UserError(problem) from None
        said = one_line(Exception(str(error.details()).rpartition("last error: ")[2]), 120)
        raise UserError(f"no Ray cluster at {shown(address)} ({said}); {_START}") from None
    if reply.ray_version != ray.__version__:
        raise UserError(
            f"the Ray cluster at {place} has version {reply.ray_version}, must be "
            f"{ray.__version__}; install the locked versions on every node"
        )
    return place


def _resolved(address: str) -> str:
    """Return HOST:PORT of an address."""
    if address == "auto":
        # Ray keeps no note of a cluster whose files are in a folder of their own.
        noted = canonicalize_bootstrap_address("auto")
        found = [noted] if noted else sorted(find_gcs_addresses())  # type: ignore[no-untyped-call]
        if len(found) == 1:
            return str(found[0])
        known = f"several run here, {', '.join(found)}: name one" if found else "none runs here"
        raise UserError(f"no Ray cluster at auto ({known}); {_START}")
    place = _PLACE.fullmatch(address)
    if not place or not 0 < int(place[1]) < 65536:
        raise UserError(
            f"no Ray cluster at {shown(address)}: the address must be auto or HOST:PORT, as a node "
            "of the cluster knows it; from elsewhere, use ray job submit"
        )
    return str(canonicalize_bootstrap_address(address))


def _ask(place: str) -> Any:
    """Return whether a cluster is alive, and its version."""
    # An outside proxy is not the way to the own cluster.
    channel = init_grpc_channel(place, options=[("grpc.enable_http_proxy", 0)])
    try:
        stub = _SERVICES.NodeInfoGcsServiceStub(channel)
        return stub.CheckAlive(_MESSAGES.CheckAliveRequest(), timeout=SECONDS)
    finally:
        channel.close()
