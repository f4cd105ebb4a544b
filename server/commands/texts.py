"""Files of texts, one a line."""

from pathlib import Path

from server.client import ClientError


def lines_of(path: Path, code: str) -> list[str]:
    """The lines that are not empty. code: of the ClientError for a file that is no UTF-8 text or has none; OSError."""
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ClientError(f"{path} is not UTF-8 text", code) from None
    if not found:
        raise ClientError(f"{path} holds no prompts", code)
    return found
