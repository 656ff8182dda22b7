"""Path templates of google.api.http: which URL paths they match, and what the variables get.

https://github.com/googleapis/googleapis/blob/master/google/api/http.proto describes their syntax and its meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

_TOKEN = re.compile(
    r"""
    (?P<slash>/)
    | \{ (?P<field>[\w.]+) (?: = (?P<segments>[^{}]+) )? \}
    | (?P<wildcard>\*\*?(?!\*))
    | (?P<verb>:[^/{}*:]+) $
    | (?P<literal>[^/{}*:]+)
    """,
    re.VERBOSE,
)
_WILDCARDS = {"*": "[^/]+", "**": ".*"}
_LITERAL, _ONE, _MANY = range(3)
_ENCODED_SLASH = re.compile("(%2f)", re.IGNORECASE)


@dataclass(frozen=True)
class Variable:
    """A field, dotted where it is nested, that a part of the path gives its value."""

    field: str
    is_one_segment: bool

    def decode(self, raw: str) -> str:
        """The value of a percent-encoded part of a path.

        Where the part has many segments, an encoded slash stays as it is, so that it is told from one between segments.

        Raises:
            UnicodeDecodeError: the encoded bytes are not UTF-8.
        """
        if self.is_one_segment:
            return unquote(raw, errors="strict")
        pieces = _ENCODED_SLASH.split(raw)
        return "".join(piece if index % 2 else unquote(piece, errors="strict") for index, piece in enumerate(pieces))


@dataclass(frozen=True)
class PathTemplate:
    """A parsed template. Templates sorted by `order` are sorted by how special they are, the most special first."""

    text: str
    pattern: re.Pattern[str]
    variables: tuple[Variable, ...]
    order: tuple[bool, tuple[int, ...]]

    def match(self, raw_path: str) -> tuple[str, ...] | None:
        """What each variable covers of a path, still percent-encoded; None where the template does not match."""
        found = self.pattern.fullmatch(raw_path)
        return found.groups() if found else None

    @property
    def openapi(self) -> str:
        """The template as OpenAPI writes it."""
        return re.sub(r"=[^{}]+\}", "}", self.text)


def parse(text: str) -> PathTemplate:
    """Parses a template such as `/v1/{name=instances/*}:stop`.

    Raises:
        ValueError: it is not a template.
    """
    pattern, variables, ranks = "", [], []
    has_verb = False
    for token in _tokens(text):
        if field := token["field"]:
            segments = token["segments"] or "*"
            variables.append(Variable(field, segments == "*"))
            pattern += f"({_pattern(segments)})"
            ranks += [_rank(segment) for segment in segments.split("/")]
        elif token["slash"]:
            pattern += "/"
        elif token["verb"]:
            pattern += re.escape(token["verb"])
            has_verb = True
        else:
            pattern += _pattern(token[0])
            ranks.append(_rank(token[0]))
    return PathTemplate(text, re.compile(pattern), tuple(variables), (not has_verb, tuple(ranks)))


def _tokens(text: str) -> list[re.Match[str]]:
    tokens: list[re.Match[str]] = []
    end = 0
    while end < len(text):
        token = _TOKEN.match(text, end)
        if token is None:
            raise ValueError(f"{text!r} is not a path template from column {end + 1} on")
        tokens.append(token)
        end = token.end()
    return tokens


def _pattern(segments: str) -> str:
    return "/".join(_WILDCARDS.get(segment) or re.escape(segment) for segment in segments.split("/"))


def _rank(segment: str) -> int:
    return {"*": _ONE, "**": _MANY}.get(segment, _LITERAL)
