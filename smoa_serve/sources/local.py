"""Paths and file:// below the operator's folders."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from ..errors import AdapterError, AdapterNotFoundError, PathNotAllowedError, shown


def local_path(source: str) -> str:
    """The path that a source without a remote scheme means: itself, or that of file:///…

    Raises:
        AdapterError: a file URI with a host, or a path that is not absolute.
    """
    found = re.match(r"file://", source, re.IGNORECASE)
    if found is None:
        return source
    path = source[found.end() :].removeprefix("localhost")
    if not path.startswith("/") or "?" in path or "#" in path:
        raise AdapterError(source, "a file URI names an absolute path and nothing else, as file:///adapters/legal")
    return unquote(path)


def confine(path: str, roots: Sequence[Path]) -> Path:
    """The folder that `path` means, inside one of the roots.

    Args:
        path: absolute, or relative to a root.
        roots: folders configured by the operator.

    Raises:
        PathNotAllowedError: no roots are configured, or the path or a file right below it (links followed) leaves them.
            Whether something exists outside the roots is not revealed.
        AdapterNotFoundError: it lies inside, but there is nothing.
        AdapterError: it lies inside, but may not be read.
    """
    if not roots:
        raise PathNotAllowedError(
            "adapters cannot be loaded over HTTP: no folder is configured for it. Start the server with "
            "--adapters-root DIR (or SMOA_ADAPTERS_ROOT)."
        )
    given = Path(path)
    inside = []
    for root in (root.expanduser().resolve() for root in roots):
        real = _resolve(given if given.is_absolute() else root / given)
        if real is not None and real.is_relative_to(root) and ".." not in given.parts:
            inside.append((root, real))
    if not inside:
        raise PathNotAllowedError(
            f"the adapter path {shown(path)} lies outside the configured folders; give a path below one of them, "
            "absolute or relative to it, without '..' and without links that lead out"
        )
    try:
        existing = [(root, real) for root, real in inside if real.exists()]
        if not existing:
            raise AdapterNotFoundError(path, f"there is nothing at this path: {shown(path)}")
        root, found = existing[0]
        # A weight file is read with the configuration beside it.
        files = list(found.iterdir()) if found.is_dir() else [found.parent / "adapter_config.json"]
    except PermissionError:
        raise AdapterError(path, "it cannot be read: permission denied; let the server's user read it") from None
    for file in files:
        target = _resolve(file)
        if target is None or not target.is_relative_to(root):
            raise PathNotAllowedError(
                f"{file.name} of the adapter {shown(path)} is a link out of the configured folders"
            )
    return found


def _resolve(path: Path) -> Path | None:
    """The path with its links followed; None when it cannot be one: too long, a null byte, links in a circle."""
    try:
        real = path.resolve()
        with suppress(PermissionError):  # told apart later, and only inside of the roots
            real.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return real
