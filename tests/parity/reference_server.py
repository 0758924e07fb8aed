"""A child process: llama.cpp's own C++ server answers the questions it reads, one JSON object a line.

In a process of its own, since two copies of llama.cpp in one process share symbol names.
Usage: reference_server.py LLM MMPROJ < questions.jsonl > answers.jsonl
"""

import base64
import json
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    llm, mmproj = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = llm
    params.mmproj.path = mmproj
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.cpuparams_batch.n_threads = 2
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        row = json.loads(line)
        image = base64.b64encode(Path(row["image"]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": row["question"]},
        ]
        answer = server.handle_chat_completions(
            {
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 96,
                "logprobs": True,
                "top_logprobs": 2,
                "cache_prompt": False,
            }
        )
        choice = answer["choices"][0]
        pieces = [entry["token"] for entry in choice["logprobs"]["content"]]
        sys.stdout.write(json.dumps({"text": choice["message"]["content"], "pieces": pieces}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
