"""Formats: the form of a row -> the texts of a record.

    instruction         {"instruction": "Why?", "input": "Code 97", "response": "Because."}     also context, output
    prompt/completion   {"prompt": "Why?", "completion": "Because."}                            also lists of messages
    messages            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", ...}]}
    conversations       {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", ...}]}

The fields of a row name its form. A name that the user gives with data.*_field replaces the names of the form.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lit_phi2.data.chat import parse_messages, read_exchange
from lit_phi2.data.invalid import RecordError
from lit_phi2.data.prompts import find_template_header
from lit_phi2.data.readers.json_text import DECODER
from lit_phi2.data.text import NOT_UNICODE, check_text, describe_kind, is_name, is_valid_unicode, quote_names

EXPECTED_FORMS = (
    "Expected instruction and response (or output), prompt and completion, messages, or conversations; "
    "data.instruction_field and data.response_field give other names."
)

# Beginnings of turns in the templates of Alpaca, Vicuna, Llama, ChatML, Zephyr, Gemma, Open Assistant and Phi-2
_TEMPLATE_MARKERS = (
    *("### Instruction:", "### Response:", "### Human:", "### Assistant:", "### User:", "USER:", "Human:", "[INST]"),
    *("<|start_header_id|>", "<|im_start|>", "<|user|>", "<start_of_turn>", "<|prompter|>", "Instruct:"),
)


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names that the user gives to the parts of a record; None: by the record's form."""

    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class RecordForm:
    """The fields that hold the parts of a record.

    Attributes:
        name: as `inspect` prints it.
        instruction: possible names of one field, which every record has.
        input: possible names of a field that a record may lack.
        response: possible names; empty where the messages of the instruction's field hold the response too.
    """

    name: str
    instruction: tuple[str, ...]
    input: tuple[str, ...] = ()
    response: tuple[str, ...] = ()


class Texts(NamedTuple):
    """The parts of a record; input and response may be empty."""

    instruction: str
    input: str
    response: str


INSTRUCTION = RecordForm("instruction", ("instruction",), ("input", "context"), ("response", "output"))
PROMPT = RecordForm("prompt/completion", ("prompt",), (), ("completion",))
MESSAGES = RecordForm("messages", ("messages",))
CONVERSATIONS = RecordForm("conversations", ("conversations",))
FORMS = (INSTRUCTION, PROMPT, MESSAGES, CONVERSATIONS)


def possible_forms(fields: FieldNames) -> tuple[RecordForm, ...]:
    """The forms under the names that the user gave; a form is preferred to those after it."""
    given: dict[str, Any] = {
        part: (name,) for part in ("instruction", "input", "response") if (name := getattr(fields, part))
    }
    # The messages of a chat hold instruction and response, so naming one of the two excludes a chat.
    is_flat = "instruction" in given or "response" in given
    forms = FORMS[:2] if is_flat else FORMS
    return tuple(replace(form, **given) for form in forms)


def find_form(row: dict[str, Any], forms: Sequence[RecordForm]) -> RecordForm | None:
    """The form that the fields of a row name; the most complete one, and of equals the first."""
    with_value = [name for name, value in row.items() if value is not None]
    for names in (with_value, row):
        for form in forms:
            if _is_any_in(form.instruction, names) and (not form.response or _is_any_in(form.response, names)):
                return form
    for names in (with_value, row):
        for form in forms:
            if _is_any_in(form.instruction, names):
                return form
    return None


def is_complete(row: dict[str, Any], form: RecordForm) -> bool:
    """Whether instruction and response have a value."""
    return all(any(row.get(name) is not None for name in names) for names in (form.instruction, form.response) if names)


def read_texts(row: dict[str, Any], form: RecordForm, *, turns: str, needs_response: bool) -> Texts:
    """The parts of a record.

    Args:
        row: of that form.
        form: of the file.
        turns: which exchange of a conversation is the record; one of chat.TURNS.
        needs_response: whether a record without a response is invalid.

    Raises:
        RecordError: a part is missing, malformed or ambiguous, or holds a section header of the template.
    """
    name = _choose_name(row, form.instruction, "instruction")
    if form.response:
        response_name = _choose_name(row, form.response, "response")
        values = row.get(name), row.get(response_name)
        if form.name == PROMPT.name and any(isinstance(value, list) for value in values):
            instruction, response = _read_prompt_messages(row, name, response_name, turns, needs_response)
        else:
            instruction = _read_required(row, name, form.instruction)
            if needs_response:
                response = _read_required(row, response_name, form.response)
            else:
                response = _read_optional(row, response_name)
    else:
        response_name, place = name, f"field {name!r}"
        messages = parse_messages(_parse_json_list(row.get(name)), place)
        instruction, response = read_exchange(messages, place, turns=turns, needs_response=needs_response)
    input_name = _choose_name(row, form.input, "input") if form.input else ""
    input_text = _read_optional(row, input_name) if form.input else ""
    for field_name, text in ((name, instruction), (input_name, input_text), (response_name, response)):
        _check_headers(field_name, text)
    return Texts(instruction, "" if input_text.isspace() else input_text, response)


def no_form_error(row: dict[str, Any], forms: Sequence[RecordForm], noun: str = "field") -> RecordError:
    """Why a row has none of the forms.

    Args:
        row: without a form.
        forms: all possible ones.
        noun: what the parts of a row are called, field or column.
    """
    text = row.get("text")
    marker = next((marker for marker in _TEMPLATE_MARKERS if marker in text), None) if isinstance(text, str) else None
    if marker:
        return RecordError(
            f"{noun} 'text' already holds a template ({marker!r}), so nothing tells the response from the prompt. "
            f"Split it into the parts of a record, without the template. {EXPECTED_FORMS}",
            cause="text with a template",
            once=True,
        )
    if len(forms) < len(FORMS):  # the user gave a name
        return missing_error(row, forms[0].instruction, noun, once=True)
    message = f"has no {noun}s of a known form; {_list_fields(row, noun)}. {EXPECTED_FORMS}"
    return RecordError(message, cause="no form", once=True)


def missing_error(row: dict[str, Any], names: Sequence[str], noun: str = "field", *, once: bool = False) -> RecordError:
    """That a row has no field of any of these names."""
    missing = f"has no {noun} {names[0]!r}"
    others = "".join(f" or in {name!r}" for name in names[1:])
    cure = f"Expected text there{others} (data.*_field renames fields)."
    return RecordError(f"{missing}; {_list_fields(row, noun)}. {cure}", missing, once=once)


def _list_fields(row: dict[str, Any], noun: str) -> str:
    """The names of the fields; columns are named all or not at all, since without a header they are a record."""
    names = [name for name in row if name]  # spreadsheets append columns without a name
    if noun == "field":
        return f"it has {quote_names(names)}"
    return f"its columns are {quote_names(names)}" if all(map(is_name, names)) else "its first line does not hold names"


def _is_any_in(names: Sequence[str], row: Collection[str]) -> bool:
    return any(name in row for name in names)


def _choose_name(row: dict[str, Any], names: Sequence[str], part: str) -> str:
    """Which of the possible names of a part the row uses."""
    if len(names) == 1:
        return names[0]
    filled = [name for name in names if (value := row.get(name)) is not None and not _is_blank(value)]
    if len(filled) > 1:
        quoted = " and ".join(map(repr, filled))
        raise RecordError(f"has both {quoted}; set data.{part}_field to the one that is the {part} of a record.")
    return filled[0] if filled else next((name for name in names if name in row), names[0])


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and (not value or value.isspace())


def _read_required(row: dict[str, Any], name: str, names: Sequence[str]) -> str:
    if name not in row:
        raise missing_error(row, names)
    return check_text(row[name], f"field {name!r}")


def _read_optional(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"field {name!r} is {describe_kind(value)}; expected text.")
    if not is_valid_unicode(value):
        raise RecordError(f"field {name!r} {NOT_UNICODE}")
    return value


def _read_prompt_messages(
    row: dict[str, Any], name: str, response_name: str, turns: str, needs_response: bool
) -> tuple[str, str]:
    """Instruction and response of a prompt and a completion, at least one of which is a list of messages."""
    place, response_place = f"field {name!r}", f"field {response_name!r}"
    messages = parse_messages(row.get(name), place, "user")
    completion = row.get(response_name)
    if needs_response or completion not in (None, "", []):
        answers = parse_messages(completion, response_place, "assistant")
        if [answer.speaker for answer in answers] != ["assistant"]:
            raise RecordError(f"{response_place} is not one message from the assistant; expected that, or text.")
        messages += answers
    return read_exchange(messages, place, turns=turns, needs_response=needs_response)


def _parse_json_list(value: Any) -> Any:
    """The list in a JSON text, which is how a CSV file holds messages; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = DECODER.decode(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list) else value


def _check_headers(name: str, text: str) -> None:
    if header := find_template_header(text):
        raise RecordError(
            f"field {name!r} has a line that begins with {header!r}, a section header of the template; the model "
            "could not tell the two apart. Reword or indent it."
        )
