"""The example with Hugging Face's datasets, as the documentation has it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]


def test_a_data_set_gets_a_column_of_captions(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "caption-a-folder.md").read_text()
    code = re.search(r"```python\n(from datasets.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (112, 112), (50 * number, 90, 200)).save(tmp_path / "photos" / f"{number}.png")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]
    rows = pq.read_table(tmp_path / "captions.parquet").to_pylist()
    assert len(rows) == 5
    assert all(row["caption"] for row in rows)
