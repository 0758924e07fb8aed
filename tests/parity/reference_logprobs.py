"""A child process: llama.cpp's own C++ server answers, and tells the log probabilities of the likeliest tokens.

In a process of its own, since two copies of llama.cpp in one process share symbol names.
Usage: reference_logprobs.py SETTINGS < questions.jsonl > answers.jsonl
"""

import base64
import json
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    settings = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = settings["llm"]
    params.mmproj.path = settings["mmproj"]
    params.n_ctx = 2048
    params.n_parallel = 1
    params.image_max_tokens = settings["image_max_tokens"]
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.fit_params = False
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(server, json.loads(line))) + "\n")
        sys.stdout.flush()


def answer(server: xllamacpp.Server, row: dict) -> dict:
    content = []
    for part in row["content"]:
        if part["type"] == "text":
            content.append(part)
        else:
            image = base64.b64encode(Path(part["path"]).read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}})
    given = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": row["tokens"],
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
            # It reports nothing for a token that leaves a character half written.
            "logit_bias": [[token, False] for token in row["banned"]],
            "cache_prompt": False,
        }
    )
    return {
        "prompt_tokens": given["usage"]["prompt_tokens"],
        "tokens": [entry["id"] for entry in given["choices"][0]["logprobs"]["content"]],
        "top": [
            [[top["id"], top["logprob"]] for top in entry["top_logprobs"]]
            for entry in given["choices"][0]["logprobs"]["content"]
        ],
    }


if __name__ == "__main__":
    main()
