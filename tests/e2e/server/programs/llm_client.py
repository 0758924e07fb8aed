"""`llm`: attachments, a schema, a tool, and a conversation that goes on, over both of OpenAI's APIs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from asked import IMAGE_FILE, QUESTION, V1

SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT = """
def paint(colour: str) -> str:
    "Paint in a colour."
    return "painted"
"""
MODEL = """
- model_id: {name}
  model_name: any
  api_base: {v1}
  vision: true
  supports_schema: true
  supports_tools: true
  responses: {responses}
"""

with tempfile.TemporaryDirectory() as folder:
    models = [MODEL.format(name=name, v1=V1, responses=name == "responses") for name in ("chat", "responses")]
    Path(folder, "extra-openai-models.yaml").write_text("".join(models), encoding="utf-8")
    env = {**os.environ, "LLM_USER_PATH": folder}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", *arguments]
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    for model in ("chat", "responses"):
        asked = ("-m", model, "-a", str(IMAGE_FILE), QUESTION, "-o", "temperature", "0", "-o", "max_tokens", "80")
        # It puts the question before the image, which the demo model never saw so.
        assert llm(*asked) == llm(*asked, "--no-stream") != ""
        assert llm("-c", QUESTION, "-a", str(IMAGE_FILE), "-o", "temperature", "0")
        assert json.loads(llm(*asked, "--schema", json.dumps(SCHEMA)))["colour"] in {"red", "blue"}
        assert llm(*asked, "--functions", PAINT)
        assert llm("-c", QUESTION, "-o", "temperature", "0", "--no-stream")
