"""What may be fetched, from where, and at what cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

from ..adapters.source import ADAPTER_FILES, CONFIG_NAME, WEIGHTS_NAME
from ..errors import AdapterError, ConfigError, PathNotAllowedError
from .uri import Place, parse

Network = IPv4Network | IPv6Network
_LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_NAT64 = ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class SourcePolicy:
    """Settings of one server.

    Attributes:
        roots: folders that paths and file:// must lie in.
        allow: prefixes of remote URIs, by whole segments of their path ("s3://bucket/adapters", "hf://org", "hf://"),
            and networks ("10.0.0.0/8") that names of https hosts may lead to although they are not public. A prefix
            whose host is an address, or localhost, names that address.
        allow_pickle: fetch adapter_model.bin where there is no safetensors file.
        max_bytes: of one adapter, packed and unpacked.
        max_files: members that an archive may have.
        timeout_s: for all of one fetch, waiting and retries included.
        stall_s: within which something has to arrive: a KiB/s, of object stores a whole piece of 16 MiB.
        attempts: in a row that bring nothing, before it is given up.
        parallel: files of one adapter at a time.
    """

    roots: tuple[Path, ...] = ()
    allow: tuple[str, ...] = ()
    allow_pickle: bool = False
    max_bytes: int = 4 << 30
    max_files: int = 100
    timeout_s: float = 600.0
    stall_s: float = 30.0
    attempts: int = 5
    parallel: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError for a prefix that cannot be used."""
        _ = self.prefixes, self.networks

    @cached_property
    def prefixes(self) -> tuple[Place, ...]:
        """The parsed prefixes."""
        try:
            return tuple(parse(entry, prefix=True) for entry in self.allow if "://" in entry)
        except AdapterError as error:
            raise ConfigError(f"the allowed source {error.source!r} cannot be used: {error.reasons[0]}") from None

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """Addresses that may be connected to although they are not public."""
        try:
            named = tuple(ip_network(entry) for entry in self.allow if "://" not in entry)
        except ValueError as error:
            raise ConfigError(
                f"an allowed source cannot be used: {error}; give a prefix such as s3://bucket/folder, or a network"
            ) from None
        hosts = [place.host for place in self.prefixes if place.scheme in ("http", "https")]
        return named + tuple(network for host in hosts for network in _named_by(host))

    @property
    def names(self) -> tuple[str, ...]:
        """Files of an adapter that may be fetched: the configuration, then weights, the first that is there."""
        return (CONFIG_NAME, *(ADAPTER_FILES if self.allow_pickle else (WEIGHTS_NAME,)))

    def place(self, uri: str) -> Place:
        """The parts of an allowed remote URI.

        Raises:
            AdapterError: it is no source.
            PathNotAllowedError: no prefix allows it.
        """
        place = parse(uri)
        if not any(place.is_under(prefix) for prefix in self.prefixes):
            raise PathNotAllowedError(
                f"the source {place.shown!r} is not allowed; {self._allowed()}. The server's operator allows more by "
                "prefix, as --source-allow s3://bucket/folder/"
            )
        return place

    def check_origin(self, scheme: str, host: str, shown: str) -> None:
        """Refuse a redirect to a host that no prefix names.

        Raises:
            PathNotAllowedError: naming the host.
        """
        if not any(place.scheme == scheme and place.host in ("", host) for place in self.prefixes):
            raise PathNotAllowedError(
                f"the source {shown!r} redirects to {scheme}://{host}, which is not allowed; {self._allowed()}"
            )

    def check_addresses(self, host: str, addresses: Sequence[str], shown: str) -> None:
        """Refuse a host that leads to an address inside of some network.

        Raises:
            PathNotAllowedError: naming the host, not the address.
        """
        if not all(self._may_connect(ip_address(address.partition("%")[0])) for address in addresses):
            raise PathNotAllowedError(
                f"the source {shown!r} is not allowed: {host} leads to an address that is not public. The server's "
                "operator allows it by naming the address or its network, as --source-allow 10.0.0.0/8"
            )

    def _may_connect(self, address: IPv4Address | IPv6Address) -> bool:
        inner = _inner(address)
        if any(address in network or inner in network for network in self.networks):
            return True
        return all(
            a.is_global and not a.is_multicast and not getattr(a, "is_site_local", False) for a in (address, inner)
        )

    def _allowed(self) -> str:
        return (
            f"allowed are {', '.join(place.shown for place in self.prefixes)}" if self.prefixes else "none is allowed"
        )


def _named_by(host: str) -> tuple[Network, ...]:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if name == "localhost":
        return _LOOPBACK
    try:
        return (ip_network(name.strip("[]")),)
    except ValueError:
        return ()


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address
