"""Texts on the page: what is marked, what is left as it is."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lit_phi2.report.text import to_attribute, to_html
from report.conftest import Page


@given(st.text(st.characters(), max_size=40))
def test_any_text_comes_back_from_its_html(text: str) -> None:
    """Reference: the parser of the standard library; marked characters are told by their numbers."""
    page = Page(f"<p>{to_html(text)}</p>")
    expected = "".join(char if visible(char) else f"U+{ord(char):04X}" for char in text.replace("\r\n", "\n"))
    assert page.text == expected
    assert {tag for tag, _ in page.tags} <= {"p", "span", "bdi"}


@given(st.text(st.characters(), max_size=40))
def test_any_text_is_one_attribute(text: str) -> None:
    page = Page(f'<p title="{to_attribute(text)}">a</p>')
    assert page.tags[0][1].keys() == {"title"}
    assert page.tags[0][1]["title"] == "".join(char if visible(char) else f"U+{ord(char):04X}" for char in text)


def visible(char: str) -> bool:
    blank = char in "\u115f\u1160\u2800\u3164\uffa0"
    return char in "\n\t" or not (blank or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def test_letters_of_all_scripts_stay() -> None:
    assert to_html("Müller, 東京, क्षि") == "Müller, 東京, क्षि"
    assert to_html("שלום") == "<bdi>שלום</bdi>", "isolated, so that it does not reverse its neighbours"
