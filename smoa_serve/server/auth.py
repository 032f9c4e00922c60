"""Closed unless written otherwise: with an API key, every path of the server asks for it.

vLLM guards four prefixes by its key. What it or a plugin mounts beside them (`/invocations`, `/adapters`, `/tokenize`,
`/docs`, its development routes) is open there, and closed here.
"""

import hashlib
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# What load balancers, orchestrators and Prometheus ask without a key; nothing of a request's content is told there.
OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz", "/ping", "/metrics", "/metrics/"})


class KeyGuard:
    """Innermost middleware, right before the routes: whatever is mounted, and whenever, lies behind it, and what it
    refuses carries the headers of the others (CORS). A preflight never comes here, since CORS answers it.

    Args:
        app: the routes.
        keys: any of them opens.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what needs no key or has one; 401 for all else, before a websocket is accepted too."""
        if scope["type"] == "lifespan" or get_route_path(scope) in OPEN_PATHS or self._has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        response = JSONResponse({"error": "Unauthorized"}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        """As vLLM reads it, so that one header opens both doors. Every key is compared, and in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given)
        matches = [secrets.compare_digest(digest, expected) for expected in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def api_keys(args: Namespace, environment: Mapping[str, str]) -> list[str]:
    """The keys that vLLM asks for: those of `--api-key`, else $VLLM_API_KEY; none when it asks for none."""
    return [key for key in (args.api_key or [environment.get("VLLM_API_KEY")]) if key]


def guard(app: FastAPI, keys: Sequence[str]) -> None:
    """Put the guard right before the routes of an app that has not begun to serve; nothing without keys."""
    if keys:
        app.user_middleware.append(Middleware(KeyGuard, keys=keys))


def guard_built_app(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `sagemaker_standards_bootstrap`, the last that vLLM's `build_app` calls on its finished app."""
    app = kwargs.get("app") or args[0]
    guard(app, api_keys(app.state.args, os.environ))
    return wrapped(*args, **kwargs)


def _digest(key: str) -> bytes:
    """Of equal length for all keys."""
    return hashlib.sha256(key.encode("utf-8")).digest()
