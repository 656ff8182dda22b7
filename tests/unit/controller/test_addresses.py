from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmherd.controller.addresses import ADDRESSES_MAX, addresses_of, merged
from vmherd.model.instance import Address, Source

MAC = "52:00:00:00:00:01"


def interface(mac: str, *addresses: tuple[str, int], name: str = "eth0") -> dict[str, Any]:
    return {
        "name": name,
        "hardware-address": mac,
        "ip-addresses": [
            {"ip-address": text, "ip-address-type": "ipv4", "prefix": prefix} for text, prefix in addresses
        ],
    }


def test_addresses_are_those_on_the_instance_s_own_interface() -> None:
    interfaces = [
        {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
        interface("52:00:00:00:00:99", ("192.0.2.9", 24), name="docker0"),
        interface(MAC.upper(), ("10.0.2.15", 24), ("fe80::1", 64), ("fec0::5054", 64)),
    ]
    assert addresses_of(interfaces, {MAC}) == (
        Address("10.0.2.15", 24, MAC, "eth0"),
        Address("fec0::5054", 64, MAC, "eth0"),
    )


def test_a_guest_that_lies_gives_nothing() -> None:
    lies: list[Any] = [
        None,
        "text",
        {"name": 1, "hardware-address": MAC},
        {"name": "a", "hardware-address": MAC, "ip-addresses": {"no": "list"}},
        interface(MAC, ("999.1.1.1", 24)),
        interface(MAC, ("192.0.2.1", 33)),
        interface(MAC, ("192.0.2.1; rm -rf /", 24)),
    ]
    assert addresses_of(lies, {MAC}) == ()
    assert addresses_of({"no": "list"}, {MAC}) == ()


def test_a_guest_with_very_many_addresses_is_cut_short() -> None:
    many = [interface(MAC, *((f"10.0.{number // 256}.{number % 256}", 16) for number in range(5000)))]
    assert len(addresses_of(many, {MAC})) == ADDRESSES_MAX


def test_of_an_address_that_several_tell_the_most_trusted_word_is_shown() -> None:
    agent = Address("10.20.0.2", 24, MAC, "eth0", Source.AGENT)
    lease = Address("10.20.0.2", 24, MAC, source=Source.LEASE)
    other_lease = Address("10.20.0.9", 24, MAC, source=Source.LEASE)
    neighbour = Address("10.20.0.9", 24, MAC, source=Source.NEIGHBOUR)
    other_mac = Address("10.20.0.2", 24, "52:00:00:00:00:02", source=Source.NEIGHBOUR)
    assert merged((), (neighbour, lease, other_lease, other_mac)) == (lease, other_lease, other_mac)
    assert merged((agent,), (neighbour, lease)) == (agent, neighbour)
    assert merged((), ()) == ()


def test_many_addresses_are_cut_short_and_the_agents_are_kept() -> None:
    many = [Address(f"10.0.{n // 256}.{n % 256}", 16, MAC, source=Source.NEIGHBOUR) for n in range(300)]
    agent = Address("10.20.0.2", 24, MAC, "eth0")
    shown = merged((agent,), many)
    assert len(shown) == ADDRESSES_MAX
    assert shown[0] == agent


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(MAC),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "hardware-address", "ip-addresses", "ip-address", "prefix"]), inner)
    ),
    max_leaves=20,
)


@given(JSON)
def test_no_json_makes_it_fail(value: object) -> None:
    assert isinstance(addresses_of(value, {MAC}), tuple)
