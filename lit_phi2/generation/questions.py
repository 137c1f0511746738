"""Questions: instructions as text -> prompts as token ids, of the one template.

"Why was it denied?", "Code 97 ..."  ->  ### Instruction: ... ### Input: ... ### Response:  ->  [3, 17, ...]
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import find_template_header, format_prompt
from lit_phi2.data.text import NOT_UNICODE, is_valid_unicode
from lit_phi2.errors import InputError


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], inputs: Sequence[str], *, max_length: int
) -> list[list[int]]:
    """Token ids of prompts, in order.

    Args:
        tokenizer: of the base.
        instructions: one each prompt.
        inputs: one each prompt; empty where there is none.
        max_length: tokens in a prompt.

    Raises:
        InputError: a prompt is empty or too long, or contains a header of the template; names it by its number.
    """
    if isinstance(instructions, str) or len(instructions) != len(inputs):
        raise InputError("complete: expected a list of instructions and, if there are inputs, as many inputs.")
    return [
        encode_question(
            tokenizer,
            {f"complete: instruction {number}": instruction, f"complete: input {number}": input_text},
            max_length=max_length,
        )
        for number, (instruction, input_text) in enumerate(zip(instructions, inputs, strict=True), start=1)
    ]


def encode_question(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], *, max_length: int) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the base.
        texts: instruction and input, by the names that messages give them; an empty input is none.
        max_length: tokens in the prompt.

    Raises:
        InputError: the instruction is empty, a text contains a header of the template, or both are too long.
    """
    (name, instruction), (_, input_text) = texts.items()
    if not instruction.strip():
        raise InputError(f"{name}: is empty; expected a question or a task.")
    for text_name, text in texts.items():
        if not is_valid_unicode(text):
            raise InputError(f"{text_name}: {NOT_UNICODE}")
        if header := find_template_header(text):
            raise InputError(f"{text_name}: a line begins with {header!r}, a header of the template. Change that line.")
    (prompt,) = tokenize(tokenizer, [format_prompt(instruction, input_text)])
    if len(prompt) > max_length:
        what = "with its input, it" if input_text else "it"
        raise InputError(
            f"{name}: {what} has {len(prompt)} tokens; the base's positions less max_new_tokens leave {max_length}. "
            "Shorten it, or lower max_new_tokens."
        )
    return prompt
