r"""Template: the prompt template as the runtimes read it, so that a chat there sees the prompts of training.

    chat_template()      Jinja, in tokenizer_config.json and in GGUF
    ollama_template()    Go, in Ollama's Modelfile

    {"role": "user", "content": "Why?"}  ->  "### Instruction:\nWhy?\n\n### Response:\n"

A record with an input section is the message "Why?\n\n### Input:\nCode 97". The model was trained on one instruction
and one response, without a system role: the text of a system message is put in front of the next instruction.
"""

from lit_phi2.data.prompts import (
    INPUT_HEADER,
    INSTRUCTION_HEADER,
    RESPONSE_HEADER,
    TEMPLATE_DIGEST,
    TEMPLATE_VERSION,
)

_CHAT_TEMPLATE = (
    "{%- set system = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    r"{%- set system.text = message['content'] + '\n\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    r"{{- 'INSTRUCTION\n' + system.text + message['content'] + '\n\n' -}}"
    "{%- set system.text = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    r"{{- 'RESPONSE\n' + message['content'] + eos_token -}}"
    "{%- else -%}"
    "{{- raise_exception('expected the roles system, user and assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- 'RESPONSE\n' -}}{%- endif -%}"
)


def chat_template() -> str:
    """The template in Jinja, as tokenizers and llama.cpp read it."""
    return _CHAT_TEMPLATE.replace("INSTRUCTION", INSTRUCTION_HEADER).replace("RESPONSE", RESPONSE_HEADER)


def ollama_template() -> str:
    """The template in Go's language, as Ollama's Modelfile has it."""
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"
    return f"{INSTRUCTION_HEADER}\n{system}{{{{ .Prompt }}}}\n\n{RESPONSE_HEADER}\n"


def stop_texts() -> list[str]:
    """Texts that end a completion in runtimes that are given texts: the section headers, which no response has."""
    return [INSTRUCTION_HEADER, INPUT_HEADER, RESPONSE_HEADER]


def template_fingerprint() -> dict[str, str | int]:
    """Which template an export has: its version, and a digest of its prompts."""
    return {"template_version": TEMPLATE_VERSION, "template_digest": TEMPLATE_DIGEST}
