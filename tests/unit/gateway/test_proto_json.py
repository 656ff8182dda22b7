"""JSON in and out: what is taken, and what is refused with which words about which field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from vmherd.gateway import proto_json
from vmherd.gateway.descriptors import Api
from vmherd.model.errors import InvalidArgument

U64 = 2**64 - 1


def everything(zoo: Api) -> Message:
    return GetMessageClass(zoo.pool.FindMessageTypeByName("vmherd.test.zoo.Everything"))()


def read(zoo: Api, value: Any) -> dict[str, Any]:
    message = everything(zoo)
    proto_json.read(value, message, zoo.pool)
    return MessageToDict(message, descriptor_pool=zoo.pool)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"text": "é\u0000\n"}, {"text": "é\u0000\n"}),
        ({"boxedText": "x", "boxed_flag": False}, {"boxedText": "x", "boxedFlag": False}),
        ({"quiteDifferent": "a"}, {"quiteDifferent": "a"}),
        ({"odd_name": "a"}, {"quiteDifferent": "a"}),
        ({"text": None, "nested": None, "labels": None, "texts": None, "elapsed": None}, {}),
        ({"anyValue": None}, {"anyValue": None}),
        (
            {"small": "-7", "count": 4294967295.0, "large": "1e3", "total": U64},
            {"small": -7, "count": 4294967295, "large": "1000", "total": str(U64)},
        ),
        ({"blob": "-_-_"}, {"blob": "+/+/"}),
        ({"blob": "AA", "boxedBlob": "AA=="}, {"blob": "AA==", "boxedBlob": "AA=="}),
        ({"food": "MEAT", "foods": [1, "GRASS", -5]}, {"food": "MEAT", "foods": ["GRASS", "GRASS", "MEAT"]}),
        ({"exactRatio": "NaN", "ratio": "-Infinity"}, {"exactRatio": "NaN", "ratio": "-Infinity"}),
        ({"exactRatio": "1.5", "ratio": 2}, {"exactRatio": 1.5, "ratio": 2.0}),
        ({"ratio": 3.4028235e38}, {"ratio": 3.4028235e38}),  # as the largest one is printed, a little more than it is
        ({"maybeCount": 0, "maybeText": ""}, {"maybeCount": 0, "maybeText": ""}),
        ({"nestsByNumber": {"-3": {"numbers": ["1", 2]}}}, {"nestsByNumber": {"-3": {"numbers": ["1", "2"]}}}),
        ({"foodsByFlag": {"true": "GRASS"}}, {"foodsByFlag": {"true": "GRASS"}}),
        ({"elapsed": "-3.5s", "at": "2030-01-31T12:00:00Z"}, {"elapsed": "-3.500s", "at": "2030-01-31T12:00:00Z"}),
        ({"mask": "text,boxedFlag"}, {"mask": "text,boxedFlag"}),
        ({"free": {"a": [1, None, {"b": "c"}]}}, {"free": {"a": [1.0, None, {"b": "c"}]}}),
        (
            {"any": {"@type": "type.googleapis.com/vmherd.test.zoo.Animal", "legs": "4"}},
            {"any": {"@type": "type.googleapis.com/vmherd.test.zoo.Animal", "legs": 4}},
        ),
        ({"left": "a", "right": None}, {"left": "a"}),
        ({"nested": {}}, {"nested": {}}),
    ],
)
def test_taken(zoo: Api, given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert read(zoo, given) == meant


@pytest.mark.parametrize(
    ("given", "field", "description"),
    [
        ([], "body", "expected an object, got []"),
        ({"nothing": 1}, "nothing", "there is no such field"),
        ({"nested": {"text": "a"}}, "nested.text", "there is no such field"),
        ({"text": 5}, "text", "expected a string, got 5"),
        ({"flag": "true"}, "flag", 'expected true or false, got "true"'),
        ({"flag": 1}, "flag", "expected true or false, got 1"),
        ({"count": -1}, "count", "expected a whole number from 0 to 4294967295, got -1"),
        ({"count": 2**32}, "count", "expected a whole number from 0 to 4294967295, got 4294967296"),
        ({"small": 1.5}, "small", "expected a whole number from -2147483648 to 2147483647, got 1.5"),
        ({"small": True}, "small", "expected a whole number, got true"),
        ({"small": ""}, "small", 'expected a whole number, got ""'),
        ({"small": "1_0"}, "small", 'expected a whole number, got "1_0"'),
        ({"small": "٣"}, "small", 'expected a whole number, got "٣"'),
        ({"small": {}}, "small", "expected a whole number, got {}"),
        ({"total": "1e4000"}, "total", f'expected a whole number from 0 to {U64}, got "1e4000"'),
        ({"total": U64 + 1}, "total", f"expected a whole number from 0 to {U64}, got {U64 + 1}"),
        ({"totals": [1, "-1"]}, "totals[1]", f'expected a whole number from 0 to {U64}, got "-1"'),
        ({"ratio": 1e39}, "ratio", "expected a number of at most 3.40282e+38, got 1e+39"),
        ({"ratio": 3.4028236e38}, "ratio", "expected a number of at most 3.40282e+38, got 3.4028236e+38"),
        ({"exactRatio": "1e999"}, "exact_ratio", 'expected a number of at most 1.79769e+308, got "1e999"'),
        ({"exactRatio": "inf"}, "exact_ratio", 'expected a number, got "inf"'),
        ({"exactRatio": True}, "exact_ratio", "expected a number, got true"),
        ({"food": 7}, "food", "expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got 7"),
        ({"food": "HAY"}, "food", 'expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got "HAY"'),
        ({"food": True}, "food", "expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got true"),
        ({"food": []}, "food", "expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got []"),
        ({"blob": "AA*="}, "blob", 'expected base64, got "AA*="'),
        ({"blob": "A"}, "blob", 'expected base64, got "A"'),
        ({"blob": "AAAA="}, "blob", 'expected base64, got "AAAA="'),
        ({"blob": 1}, "blob", "expected base64, got 1"),
        ({"texts": "a"}, "texts", 'expected an array, got "a"'),
        ({"texts": [None]}, "texts[0]", "expected a string, got null"),
        ({"nests": [{}, 1]}, "nests[1]", "expected an object, got 1"),
        ({"labels": []}, "labels", "expected an object, got []"),
        ({"labels": {"a": 1}}, 'labels["a"]', "expected a string, got 1"),
        ({"nestsByNumber": {"x": {}}}, 'nests_by_number["x"]', 'expected a whole number, got "x"'),
        ({"nestsByNumber": {"1": {"numbers": 1}}}, 'nests_by_number["1"].numbers', "expected an array, got 1"),
        ({"foodsByFlag": {"TRUE": 0}}, 'foods_by_flag["TRUE"]', 'expected true or false, got "TRUE"'),
        ({"left": "a", "right": 1}, "right", "it, or another field that excludes it, is given already"),
        (
            {"boxedFlag": False, "boxed_flag": True},
            "boxed_flag",
            "it, or another field that excludes it, is given already",
        ),
        ({"elapsed": 3}, "elapsed", 'expected a duration in seconds such as "3.5s", got 3'),
        ({"elapsed": "3"}, "elapsed", 'expected a duration in seconds such as "3.5s", got "3"'),
        ({"laps": ["1s", "x"]}, "laps[1]", 'expected a duration in seconds such as "3.5s", got "x"'),
        ({"at": "yesterday"}, "at", 'expected a time such as "2030-01-31T12:00:00Z", got "yesterday"'),
        ({"boxedCount": -1}, "boxed_count", "expected a whole number from 0 to 4294967295, got -1"),
        ({"free": []}, "free", "expected an object, got []"),
        ({"any": {"@type": "x/unknown.Type"}}, "any", 'expected an object with @type, got {"@type": "x/unknown.Type"}'),
        ({"text": ["x" * 100]}, "text", f'expected a string, got ["{"x" * 62}…'),
    ],
)
def test_refused(zoo: Api, given: Any, field: str, description: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(zoo, given)
    assert [(it.field, it.description) for it in caught.value.violations] == [(field, description)]


def test_every_wrong_field_is_named_at_once(zoo: Api) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(zoo, {"text": 1, "nested": {"numbers": ["a", 1, "b"]}, "wrong": 1})
    assert [it.field for it in caught.value.violations] == ["text", "nested.numbers[0]", "nested.numbers[2]", "wrong"]


def test_a_flood_of_wrong_fields_is_cut(zoo: Api) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(zoo, {f"{number}{'x' * 1000}": 1 for number in range(1000)})
    assert len(caught.value.violations) == proto_json.MAX_VIOLATIONS
    assert len(caught.value.message) < 200 * proto_json.MAX_VIOLATIONS


@pytest.mark.parametrize("depth", [200, 900])
def test_a_message_nested_too_deep_is_refused(zoo: Api, depth: int) -> None:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"child": value}
    animal = GetMessageClass(zoo.pool.FindMessageTypeByName("vmherd.test.zoo.Animal"))()
    if depth == 200:
        proto_json.read(value, animal, zoo.pool)
    else:
        with pytest.raises(InvalidArgument, match="nested too deep"):
            proto_json.read(value, animal, zoo.pool)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "Expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{\n  "a": 1,\n}', "line 3, column 1"),
        (b"", "Expecting value at line 1, column 1"),
        (b"{} {}", "Extra data at line 1, column 4"),
        (b'{"a": "\n"}', "Invalid control character at at line 1, column 8"),
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"a": 1e999}', 'the number "1e999" is too large'),
        (b"1" * 5000, "is too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', '"c" is given twice in one object'),
        (b'"\xff"', "it is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8 text"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (rb'{"a": "\ud800"}', "it is not UTF-8 text"),
        (rb'{"\uDC00": 1}', "it is not UTF-8 text"),
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"a":' * 100_000, "it is nested too deep"),
    ],
)
def test_what_is_not_json_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        proto_json.load(body)
    assert why in caught.value.message
    assert caught.value.reason == "MALFORMED_JSON"
    assert len(caught.value.message) < 200


def test_a_surrogate_pair_is_a_character() -> None:
    assert proto_json.load(rb'"\ud83d\ude00"') == "😀"


def test_output_is_canonical(zoo: Api) -> None:
    message = everything(zoo)
    proto_json.read({"total": U64, "odd_name": "ü\n", "food": "GRASS"}, message, zoo.pool)
    text = proto_json.to_json(message, zoo.pool)
    assert "\n" not in text
    assert "ü" in text
    value = json.loads(text)
    assert (value["total"], value["quiteDifferent"], value["food"]) == (str(U64), "ü\n", "GRASS")
    assert (value["count"], value["texts"], value["labels"], value["blob"]) == (0, [], {}, "")
    assert "maybeCount" not in value
    assert "nested" not in value
