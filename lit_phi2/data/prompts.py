"""The one template: what a record looks like to the model, in training, sampling and prediction alike.

    ### Instruction:
    Why was this claim denied?

    ### Input:                      (only where the record has an input)
    Claim 4417, code 97, $120.00

    ### Response:
    The service is included in ...  (the response and the end token follow; the prompt ends with the newline)

An adapter answers only prompts of the template that it learned: a change here raises TEMPLATE_VERSION in `batch.py`.
"""

TEMPLATE_VERSION = 1  # kept with every adapter, which answers only the prompts that it learned
INSTRUCTION_HEADER = "### Instruction:"
INPUT_HEADER = "### Input:"
RESPONSE_HEADER = "### Response:"
HEADERS = (INSTRUCTION_HEADER, INPUT_HEADER, RESPONSE_HEADER)


def format_prompt(instruction: str, input: str = "") -> str:
    """The prompt of a record, up to where its response begins.

    >>> format_prompt("Why was it denied?")
    '### Instruction:\\nWhy was it denied?\\n\\n### Response:\\n'
    >>> format_prompt("Why?", "Code 97")
    '### Instruction:\\nWhy?\\n\\n### Input:\\nCode 97\\n\\n### Response:\\n'
    """
    section = f"{INPUT_HEADER}\n{input}\n\n" if input else ""
    return f"{INSTRUCTION_HEADER}\n{instruction}\n\n{section}{RESPONSE_HEADER}\n"


def find_template_header(text: str) -> str | None:
    """The template's section header that begins a line of this text, if one does.

    Such a text could not be told from the template itself: the model would see a second instruction or response.

    >>> find_template_header("see below\\n### Response: none")
    '### Response:'
    >>> find_template_header("the words ### Response: inside a line") is None
    True
    """
    for line in text.splitlines():
        for header in HEADERS:
            if line.startswith(header):
                return header
    return None
