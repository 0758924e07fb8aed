"""GuideLLM: load with text, images and several turns, over all three APIs."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from asked import V1
from load import offline, write_tokenizer

TEXT = "kind=synthetic_text,prompt_tokens=32,output_tokens=8"
RUNS = [
    ("/v1/chat/completions", TEXT),
    ("/v1/chat/completions", f"{TEXT},turns=2"),
    ("/v1/chat/completions", "kind=synthetic_image,width=64,height=64,output_tokens=8"),
    ("/v1/responses", TEXT),
    ("/v1/completions", TEXT),
]

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder, "result.json")
    guidellm = [Path(sys.executable).with_name("guidellm"), "run", "--profile", "kind=synchronous", "--disable-console"]
    same = ["--tokenizer", f"kind=hf_auto,model={write_tokenizer(Path(folder, 'tokenizer'))}"]
    same += ["--constraint", "kind=max_requests,count=10", "--output", f"kind=json,path={out}"]
    for path, data in RUNS:
        backend = f"kind=openai_http,target={V1.removesuffix('/v1')},request_format={path}"
        command = [*guidellm, *same, "--backend", backend, "--data", data]
        done = subprocess.run(command, env=offline(folder), cwd=folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{path} {data}: {done.stderr[-3000:]}"
        (benchmark,) = json.loads(out.read_bytes())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (10, 0), benchmark["requests"]["errored"]
        out.unlink()
