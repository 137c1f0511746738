"""Questions: instructions as text -> prompts as token ids, of the one template.

"Why was it denied?", "Code 97 ..."  ->  ### Instruction: ... ### Input: ... ### Response:  ->  [3, 17, ...]
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.encode import tokenize
from lit_phi2.data.prompts import find_template_header, format_prompt
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
    for number, texts in enumerate(zip(instructions, inputs, strict=True), start=1):
        if not texts[0].strip():
            raise InputError(f"complete: instruction {number} is empty.")
        if header := find_template_header("\n".join(texts)):
            raise InputError(f"complete: a line of question {number} begins with {header!r}, a header of the template.")
    prompts = tokenize(tokenizer, [format_prompt(*texts) for texts in zip(instructions, inputs, strict=True)])
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > max_length:
            raise InputError(
                f"complete: question {number} has {len(prompt)} tokens; the base's positions less max_new_tokens "
                f"leave {max_length}. Shorten it, or lower max_new_tokens."
            )
    return prompts
