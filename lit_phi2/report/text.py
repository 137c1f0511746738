r"""Text: untrusted texts -> HTML in which nothing is hidden, and in which identifiers are placeholders.

    "<b>Claim 4270</b>\u202e"   redacted   ->  "<b>Claim [CLAIM_NUMBER_1]</b>\u202e"
                                to_html    ->  &lt;b&gt;Claim <span class="id">[CLAIM_NUMBER_1]</span>&lt;/b&gt;
                                               <span class="cp" title="RIGHT-TO-LEFT OVERRIDE">U+202E</span>

Jinja passes every value of the template through `to_html`, so none can be forgotten there. Characters that have no
glyph could reverse, join or hide text on a page as they do on a terminal; each is shown by its number.
"""

import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

from lit_phi2.audit.identifiers import KINDS
from lit_phi2.audit.redaction import redact

MAX_CHARS = 4000  # of one text on the page

_SPECIAL = re.compile(rf"(?P<placeholder>\[(?:{'|'.join(map(str.upper, KINDS))})_\d{{1,6}}\])|[^\n\t -~]")
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a pattern without a glyph
_RIGHT_TO_LEFT = ("R", "AL", "AN")


def redacted(*texts: str) -> list[str]:
    """The texts of one record with identifiers of every kind as placeholders, the same value as the same one.

    >>> redacted("Is CLM-2024-00017 late?", "CLM-2024-00017 is.")
    ['Is [CLAIM_NUMBER_1] late?', '[CLAIM_NUMBER_1] is.']
    """
    return redact(texts, KINDS).texts


def redact_tree(value: Any) -> Any:
    """Nested plain values with each text in them redacted, and each key."""
    if isinstance(value, dict):
        return {redacted(str(key))[0]: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return redacted(value)[0] if isinstance(value, str) else value


def shorten(text: str, limit: int = MAX_CHARS) -> str:
    """A text of at most so many characters, and how many are left out.

    >>> shorten("abcdef", 4)
    'abcd [... 2 more characters]'
    """
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} more characters]"


def to_html(value: Any) -> Any:
    """A value as HTML; markup stays as it is.

    >>> to_html("a<b")
    Markup('a&lt;b')
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    html = Markup(_SPECIAL.sub(_mark, str(escape(value.replace("\r\n", "\n")))))
    is_mixed = (
        any(unicodedata.bidirectional(char) in _RIGHT_TO_LEFT for char in value) if not value.isascii() else False
    )
    return Markup("<bdi>{}</bdi>").format(html) if is_mixed else html


def to_attribute(value: object) -> Markup:
    r"""A value for an attribute or the title of the page, where no markup can be.

    >>> to_attribute('"\u202e')
    Markup('&#34;U+202E')
    """
    return Markup(_SPECIAL.sub(lambda match: _code_point(match[0]) or match[0], str(escape(str(value)))))


def _mark(match: re.Match[str]) -> str:
    if match["placeholder"]:
        return f'<span class="id">{match[0]}</span>'
    number = _code_point(match[0])
    if not number:
        return match[0]
    return f'<span class="cp" title="{unicodedata.name(match[0], "a character without a glyph")}">{number}</span>'


def _code_point(char: str) -> str:
    r"""The number of a character that has no glyph; empty for any other, or several.

    >>> _code_point("\x00"), _code_point("\ud83d"), _code_point("\u00e9"), _code_point("\u00a0")
    ('U+0000', 'U+D83D', '', '')
    """
    if len(char) > 1 or (char not in _BLANK and (char.isprintable() or unicodedata.category(char) == "Zs")):
        return ""
    return f"U+{ord(char):04X}"
