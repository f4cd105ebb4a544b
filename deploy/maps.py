"""The maps in the packages' READMEs: a line for each module, from its docstring.

`python -m deploy.maps` brings them up to date.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = ("server", "adapters_store", "kernels")
START, END = "<!-- map -->", "<!-- end of map -->"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    if not text:
        raise ValueError(f"{path} has no docstring")
    first = " ".join(text.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.]{2})\.(?= [A-Z`]|$)", first)[0]
    return sentence.replace("|", "\\|")


def table(package: str) -> str:
    """One table for the package's own modules and one for each package below it."""
    parts = []
    for start in sorted((ROOT / package).rglob("__init__.py")):
        folder = start.parent
        name = folder.relative_to(ROOT).as_posix()
        rows = [f"### `{name}/`", "", f"{summary(start)}.", ""]
        modules = sorted(path for path in folder.glob("*.py") if path != start)
        if modules:
            rows += ["| module | what it is |", "|---|---|"]
            rows += [f"| `{path.name}` | {summary(path)} |" for path in modules]
        parts.append("\n".join(rows).rstrip())
    return "\n\n".join(parts)


def current(package: str, text: str) -> str:
    """The text of the package's README with the map as it is now between the markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{package}/README.md lacks the markers {START} and {END}")
    return f"{before}{START}\n{table(package)}\n{END}{after}"


def main() -> None:
    for package in MAPPED:
        path = ROOT / package / "README.md"
        path.write_text(current(package, path.read_text()))


if __name__ == "__main__":
    main()
