"""llama.cpp: greedy tokens and their distributions from xllamacpp, in a process of its own.

    parent  ->  {"prompt": [ids], "count": 32}   ->  child        one JSON object a line
    parent  <-  {"tokens": [...], "reported": [...], "ids": [[...], ...], "logprobs": [[...], ...]}
    parent  ->  {"text": "..."}                  ->  {"tokens": [...]}

A process of its own, because llama.cpp ends the process on a file that it does not expect. Its server listens on a
free port of the loopback address while the child runs. It gives the logarithms of the largest probabilities; the rest
is what is missing to 1. It gives none for a token that ends inside a character of several bytes: `reported` lacks it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

TOP_LOGPROBS = 1024  # of each token: 12 ms; all 51,200 take 0.8 s


class LlamaCppError(RuntimeError):
    """llama.cpp could not load or run a file; says its last lines."""


class LlamaCppProcess:
    """A model, with or without an adapter, loaded by llama.cpp in a child process; a context manager.

    Args:
        model: a GGUF file.
        adapter: a GGUF file with an adapter for it.
        context: tokens of the longest prompt and completion together.
        num_threads: of its matrix products.
    """

    def __init__(self, model: Path, adapter: Path | None, *, context: int, num_threads: int) -> None:
        settings = {"model": str(model), "adapter": str(adapter) if adapter else None, "context": context}
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  see __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lit_phi2.export.llama_cpp", json.dumps(settings | {"num_threads": num_threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger would attach to it otherwise
        )

    def __enter__(self) -> "LlamaCppProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def greedy(self, prompt: list[int], count: int, num_probs: int = TOP_LOGPROBS) -> dict[str, Any]:
        """Tokens until EOS or count, and of those reported the ids and logarithms of the largest probabilities."""
        return self._ask({"prompt": prompt, "count": count, "num_probs": num_probs})

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without reading any of it as a special token."""
        tokens: list[int] = self._ask({"text": text})["tokens"]
        return tokens

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise LlamaCppError(f"llama.cpp ended with {self._process.wait()}: {self._last_lines()}")
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise LlamaCppError(f"llama.cpp: {result['error']}")
        return result

    def _last_lines(self) -> str:
        self._stderr.seek(0)
        return " | ".join(self._stderr.read().splitlines()[-3:])


def serve(settings: dict[str, Any], answers: IO[str]) -> None:
    """Answer the requests on stdin, until it ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel, params.warmup = settings["context"], 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["num_threads"]
    if settings["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    address = server.listening_address
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "text" in request:
                body = {"content": request["text"], "add_special": True, "parse_special": False}
                answer = _post(f"{address}/tokenize", body)
            else:
                answer = _completion(address, request)
        except Exception as error:  # the parent reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _completion(address: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = _post(
        f"{address}/completion",
        {
            "prompt": request["prompt"],
            "n_predict": request["count"],
            "temperature": 0,
            "n_probs": request["num_probs"],
            "return_tokens": True,
        },
    )
    steps = answer.get("completion_probabilities", [])
    return {
        "tokens": answer["tokens"],
        "reported": [step["id"] for step in steps],
        "ids": [[entry["id"] for entry in step["top_logprobs"]] for step in steps],
        "logprobs": [[entry["logprob"] for entry in step["top_logprobs"]] for step in steps],
    }


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    from urllib.request import Request, urlopen

    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints itself goes to stderr
    serve(json.loads(sys.argv[1]), results)
