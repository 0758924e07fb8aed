"""The web page at `/`: its files, and the headers that browsers show them under.

Nothing is loaded from elsewhere, no script or style stands in the markup, and text cannot become markup.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

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

router = APIRouter(include_in_schema=False)
_page = StaticFiles(packages=[("opsin.server", "page")])
_demo = StaticFiles(packages=[("opsin.models", "demo")])


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return await _file(_page, "index.html", request)


@router.api_route("/page/example.png", methods=["GET", "HEAD"])
async def example(request: Request) -> Response:
    """The demo model's image, for those who have none at hand."""
    return await _file(_demo, "shapes.png", request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request, name: str) -> Response:
    """A file of the page. Raises HTTPException (404) for names outside its folder, too."""
    return await _file(_page, name, request)


async def _file(folder: StaticFiles, name: str, request: Request) -> Response:
    response = await folder.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response
