"""`llm`: a prompt with an attachment, a schema, and a conversation that goes on."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from asked import IMAGE_FILE, QUESTION, V1

with tempfile.TemporaryDirectory() as folder:
    line = f"- model_id: here\n  model_name: any\n  api_base: {V1}\n  vision: true\n  supports_schema: true\n"
    Path(folder, "extra-openai-models.yaml").write_text(line, encoding="utf-8")
    env = {**os.environ, "LLM_USER_PATH": folder}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", "-m", "here", *arguments]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    asked = ("-a", str(IMAGE_FILE), QUESTION, "-o", "temperature", "0")
    # It puts the question before the image, which the demo model never saw so.
    assert llm(*asked) == llm(*asked, "--no-stream") != ""
    assert llm("-c", QUESTION, "-o", "temperature", "0")
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    assert json.loads(llm(*asked, "--schema", json.dumps(schema)))["colour"] in {"red", "blue"}
