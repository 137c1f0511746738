"""Prompts: the one template, for training, sampling and prediction alike.

    ### Instruction:
    Why was this claim denied?

    ### Input:                      (only if the record has an input)
    Claim 4417, code 97, $120.00

    ### Response:
    The service is included in ...  (the response and EOS follow; the prompt ends with the newline)

An adapter works only with the template that it was trained on: raise TEMPLATE_VERSION with every change here. Every
adapter also has TEMPLATE_DIGEST, so that a change without a new version is noticed.
"""

import hashlib

TEMPLATE_VERSION = 1  # saved with every adapter; an adapter with another version is refused
INSTRUCTION_HEADER = "### Instruction:"
INPUT_HEADER = "### Input:"
RESPONSE_HEADER = "### Response:"
HEADERS = (INSTRUCTION_HEADER, INPUT_HEADER, RESPONSE_HEADER)
_HEADER_START = "### "  # of each of them


def format_prompt(instruction: str, input: str = "") -> str:
    """The prompt of a record, up to the start of its response.

    >>> format_prompt("Why was it denied?")
    '### Instruction:\\nWhy was it denied?\\n\\n### Response:\\n'
    >>> format_prompt("Why?", "Code 97")
    '### Instruction:\\nWhy?\\n\\n### Input:\\nCode 97\\n\\n### Response:\\n'
    """
    section = f"{INPUT_HEADER}\n{input}\n\n" if input else ""
    return f"{INSTRUCTION_HEADER}\n{instruction}\n\n{section}{RESPONSE_HEADER}\n"


def find_template_header(text: str) -> str | None:
    """The first section header of the template that begins a line of the text, or None.

    The model would see a second instruction or response in such a text, so records that contain one are invalid. Every
    line end that Unicode knows counts, also one that no file is divided at: to refuse is the safe side.

    >>> find_template_header("see below\\n### Response: none")
    '### Response:'
    >>> find_template_header("the words ### Response: inside a line") is None
    True
    """
    if _HEADER_START not in text:  # nearly all texts, in a twentieth of the time
        return None
    for line in text.splitlines():
        for header in HEADERS:
            if line.startswith(header):
                return header
    return None


# One with, and one without an input.
_PROBES = format_prompt("instruction", "input"), format_prompt("instruction")
TEMPLATE_DIGEST = hashlib.sha256("\0".join(_PROBES).encode()).hexdigest()[:16]
