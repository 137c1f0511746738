"""Prompts: the template, compared with text written by hand."""

import pytest

from lit_phi2.data.prompts import HEADERS, find_template_header, format_prompt


def test_a_prompt_without_input_has_no_input_section() -> None:
    expected = """### Instruction:
Why was claim 4417 denied?

### Response:
"""
    assert format_prompt("Why was claim 4417 denied?") == expected


def test_the_input_section_follows_the_instruction() -> None:
    expected = """### Instruction:
Why was this claim denied?

### Input:
Claim 4417
Code 97, $120.00

### Response:
"""
    assert format_prompt("Why was this claim denied?", "Claim 4417\nCode 97, $120.00") == expected


def test_text_is_inserted_unchanged() -> None:
    """Braces, percent signs and outer spaces have no meaning, and an empty input has no section."""
    assert format_prompt(" {input} 100 % ", "") == "### Instruction:\n {input} 100 % \n\n### Response:\n"


@pytest.mark.parametrize("header", ["### Instruction:", "### Input:", "### Response:"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\u2028"])
def test_a_header_at_the_start_of_any_line_is_found(header: str, line_break: str) -> None:
    assert find_template_header(header) == header
    assert find_template_header(f"As above.{line_break}{header} none") == header


@pytest.mark.parametrize("text", ["", "see ### Response: below", "a\n ### Response:", "### Responses", "## Response:"])
def test_a_header_inside_a_line_or_another_heading_is_allowed(text: str) -> None:
    assert find_template_header(text) is None


def test_all_headers_of_the_template_are_searched_for() -> None:
    """Reference: the lines of a complete prompt that begin with ###."""
    headers = [line for line in format_prompt("a", "b").splitlines() if line.startswith("###")]
    assert headers == list(HEADERS)
