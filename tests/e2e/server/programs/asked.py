"""What the programs ask: the demo model's image and one of the questions it was trained on."""

import base64
import sys
from pathlib import Path

V1, IMAGE_FILE = sys.argv[1], Path(sys.argv[2])
DATA = IMAGE_FILE.read_bytes()
IMAGE = "data:image/png;base64," + base64.b64encode(DATA).decode()
QUESTION, ANSWER = "What do you see at the top left?", "a small pink ring."
CONTENT = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}]
