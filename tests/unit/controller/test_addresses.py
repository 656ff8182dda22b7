from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmherd.controller.addresses import ADDRESSES_MAX, addresses_of
from vmherd.model.instance import Address

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
