"""The web page at `/`: its files, and the headers under which browsers show them.

Nothing is loaded from elsewhere, no script or style stands in the markup, and text cannot become markup.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # An update must not leave a browser with half of the old page; the tag keeps that cheap.
    "Cache-Control": "no-cache",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}

router = APIRouter(include_in_schema=False)


@cache
def page_files() -> dict[str, bytes]:
    """Every file of the page by name, and the demo model's picture for those who have none at hand."""
    folder = Path(str(files("opsin.server"))) / "page"
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in TYPES}
    found["example.png"] = Path(str(files("opsin.models"))).joinpath("demo", "shapes.png").read_bytes()
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return _reply(request, "index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request, name: str) -> Response:
    """A file the page is made of."""
    # Looked up, never joined to a path: there is no way out of the folder.
    if name not in page_files():
        raise HTTPException(404, "The page has no such file.")
    return _reply(request, name)


def _reply(request: Request, name: str) -> Response:
    body = page_files()[name]
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=TYPES[Path(name).suffix])
