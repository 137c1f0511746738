"""Chat: the messages of a conversation -> the instruction and the response of a record.

    system      You answer briefly.         ->  instruction  You answer briefly.
    user        Why was claim 12 denied?                     (a blank line)
    assistant   A referral was missing.                      Why was claim 12 denied?
                                            ->  response     A referral was missing.

A message is {"role": ..., "content": ...} or {"from": ..., "value": ...}. A record is one exchange of user and
assistant. `data.turns` decides about a conversation of several:

    error   it is invalid
    first   the system text with the first exchange; what follows is left out
    last    the system text with the last exchange; what was said before is left out
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_phi2.data.invalid import RecordError
from lit_phi2.data.text import check_text, describe_kind

TURNS = ("error", "first", "last")

_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), _SYSTEM),
    **dict.fromkeys(("user", "human"), _USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), _ASSISTANT),
}
_TOOLS = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        place: for messages of an error, such as "field 'messages': message 2".
        speaker: system, user or assistant.
        text: its content; only that of a system may be empty.
        is_learned: OpenAI's weight is not 0.
    """

    place: str
    speaker: str
    text: str
    is_learned: bool = True


def parse_messages(value: Any, place: str, default_speaker: str = "") -> list[Message]:
    """The messages in a value of a record.

    Args:
        value: a list of messages, or a text if there is a default speaker.
        place: for messages of an error, such as "field 'messages'".
        default_speaker: the speaker of a text.

    Raises:
        RecordError: the value is none, or a message is malformed, empty, or from a tool.
    """
    if default_speaker and not isinstance(value, list):
        return [Message(place, default_speaker, check_text(value, place))]
    if not isinstance(value, list):
        found = "has no value" if value is None else f"is {describe_kind(value)}"
        raise RecordError(f"{place} {found}; expected a list of messages, in a CSV file as JSON.")
    if not value:
        raise RecordError(f"{place} is an empty list; expected messages.")
    return [_parse_message(message, f"{place}: message {number}") for number, message in enumerate(value, start=1)]


def read_exchange(messages: Sequence[Message], place: str, *, turns: str, needs_response: bool) -> tuple[str, str]:
    """Instruction and response of the exchange that `turns` selects.

    Args:
        messages: of the whole conversation.
        place: for messages of an error.
        turns: one of TURNS.
        needs_response: whether the exchange must have an answer; without one the response is empty.

    Raises:
        RecordError: the messages do not alternate, are several exchanges against `turns`, or lack an answer.
    """
    system, exchanges = _split_exchanges(messages, place)
    if len(exchanges) > 1 and turns == "error":
        raise RecordError(
            f"{place} holds more than one exchange of user and assistant; expected one. Set data.turns to 'first' or "
            "'last' to take that exchange and leave out the others."
        )
    question, answer = exchanges[0 if turns == "first" else -1]
    if answer is None:
        if needs_response:
            raise RecordError(f"{place} ends with a message from the user; expected the assistant's answer after it.")
    elif needs_response and not answer.is_learned:
        raise RecordError(
            f"{answer.place} has the weight 0, so nothing of it is to be learned. Remove the record, or its weight."
        )
    instruction = f"{system}\n\n{question.text}" if system else question.text
    return instruction, answer.text if answer else ""


def _parse_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise RecordError(f"{place} is {describe_kind(message)}; expected an object with role and content.")
    keys = ("role", "content") if message.get("from") is None else ("from", "value")
    speaker, content = _parse_speaker(message.get(keys[0]), place), message.get(keys[1])
    if message.get("tool_calls") or message.get("function_call"):
        raise RecordError(f"{place} calls a tool; expected text alone.")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise RecordError(f"{place} has a weight other than 0 and 1; expected one of the two, or none.")
    text = _join_parts(content, place) if isinstance(content, list) else content
    if speaker == _SYSTEM and text in (None, ""):
        return Message(place, speaker, "")
    return Message(place, speaker, check_text(text, place), weight != 0)


def _parse_speaker(role: Any, place: str) -> str:
    """The speaker of a message; a role may be any text, so that none is shown."""
    name = role.lower() if isinstance(role, str) else ""
    if name not in _SPEAKERS:
        found = "is from a tool" if name in _TOOLS else "has no role" if role is None else "has another role"
        raise RecordError(f"{place} {found}; expected system, user or assistant.")
    return _SPEAKERS[name]


def _join_parts(parts: list[Any], place: str) -> str:
    """The text of a content in parts, as OpenAI's API takes it: one part a line."""
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RecordError(f"{place}: part {number} is not of the type text; expected text alone.")
        check_text(part.get("text"), f"{place}: part {number}")
    return "\n".join(part["text"] for part in parts)


def _split_exchanges(messages: Sequence[Message], place: str) -> tuple[str, list[tuple[Message, Message | None]]]:
    """The system text, and each message of the user with its answer."""
    system, previous = "", ""
    exchanges: list[tuple[Message, Message | None]] = []
    for index, message in enumerate(messages):
        if message.speaker == previous:
            raise RecordError(
                f"{message.place} is from the {previous}, as is the one before; expected user and assistant in turn."
            )
        if message.speaker == _SYSTEM:
            if index > 0:
                raise RecordError(f"{message.place} is from the system; expected that at the beginning alone.")
            system = message.text
        elif message.speaker == _USER:
            exchanges.append((message, None))
        elif not exchanges:
            raise RecordError(f"{message.place} is from the assistant; expected one from the user before it.")
        else:
            exchanges[-1] = (exchanges[-1][0], message)
        previous = message.speaker
    if not exchanges:
        raise RecordError(f"{place} holds no message from the user; expected one.")
    return system, exchanges
