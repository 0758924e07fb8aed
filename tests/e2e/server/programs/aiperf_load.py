"""AIPerf: load with images and in several turns, over all three APIs; and the server's own metrics, which it reads."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from asked import V1
from load import offline, write_tokenizer

TOKENS = 8
IMAGES = ("--image-width-mean", "64", "--image-height-mean", "64")
RUNS = {
    "chat": ("--endpoint-type", "chat", "--streaming", "--request-count", "10", "--concurrency", "2", *IMAGES),
    "turns": ("--endpoint-type", "chat", "--num-sessions", "5", "--session-turns-mean", "2", "--concurrency", "2"),
    "responses": ("--endpoint-type", "responses", "--streaming", "--request-count", "10", *IMAGES),
    "completions": ("--endpoint-type", "completions", "--streaming", "--request-count", "10"),
}

with tempfile.TemporaryDirectory() as folder:
    home = Path(folder)
    same = ["--model", "any", "--url", V1.removesuffix("/v1"), "--tokenizer", write_tokenizer(home / "tokenizer")]
    same += ["--isl", "40", "--osl", str(TOKENS), "--num-dataset-entries", "5", "--ui", "none"]
    same += ["--use-server-token-count", "--extra-inputs", '{"ignore_eos": true, "guard": false, "temperature": 0}']
    for name, options in RUNS.items():
        out = home / name
        command = [Path(sys.executable).with_name("aiperf"), "profile", *same, *options, "--artifact-dir", out]
        done = subprocess.run(command, env=offline(folder), cwd=folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]} {done.stderr[-2000:]}"
        result = json.loads((out / "profile_export_aiperf.json").read_bytes())
        assert result["error_summary"] == [], result["error_summary"]
        assert result["request_count"]["avg"] == 10
        assert ("num_images" in result) == (options[-4:] == IMAGES)
        assert ("time_to_first_token" in result) == ("--streaming" in options)
        if name != "responses":  # there it reads no usage of an answer that ends at its limit
            assert result["usage_completion_tokens"]["min"] == result["usage_completion_tokens"]["max"] == TOKENS
        seen = json.loads((out / "server_metrics_export.json").read_bytes())
        assert "opsin:e2e_request_latency_seconds" in seen["metrics"]
