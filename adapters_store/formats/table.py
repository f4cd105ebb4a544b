"""What is known of every method: each paper this server was built for, each of PEFT's types, and what we serve besides.

`python -m adapters_store.formats.table` writes the tables into METHODS.md.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.formats import methods, peft_types
from adapters_store.formats.method import Method
from adapters_store.formats.papers import PAPERS, Paper, Status

START, END = "<!-- methods: start -->", "<!-- methods: end -->"
FILE = Path(__file__).with_name("METHODS.md")


@dataclass(frozen=True, slots=True)
class Known:
    """A method: whether it is served in a form of its own, folded to a low-rank delta, or declined and why."""

    name: str
    status: Status
    note: str
    source: str


def papers() -> list[Known]:
    """In the order of `PAPERS`."""
    return [_of_paper(paper) for paper in PAPERS]


def types() -> list[Known]:
    """By `peft_type`: PEFT's own and ours; a variant of a LoRA is named after it."""
    known = [Known("LORA", "native", "Served from its file as it is.", "arXiv 2106.09685")]
    known += [_of_method(_type_name(method), method) for method in methods.METHODS]
    known += [_declined(name, name, "PEFT" if name in peft_types.PEFT_TYPES else "ours") for name in methods.DECLINED]
    missing = sorted(peft_types.PEFT_TYPES - {each.name for each in known})
    known += [Known(name, "declined", "There is no importer yet.", "PEFT") for name in missing]
    return sorted(known, key=lambda each: each.name)


def known() -> list[Known]:
    """All of them, papers first; a type that stands for a paper of its name is told once."""
    told = papers()
    names = {_plain(each.name) for each in told}
    return told + [each for each in types() if _plain(each.name) not in names]


def markdown() -> str:
    """Both tables, without the markers."""
    return f"### Papers\n\n{_rows(papers())}\n### Values of `peft_type`\n\n{_rows(types())}"


def with_tables(text: str) -> str:
    """text with what stands between the markers exchanged. Raises ValueError where they are missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} or {END}")
    return f"{before}{START}\n{markdown()}{END}{after}"


def main() -> None:
    FILE.write_text(with_tables(FILE.read_text()))
    sys.stdout.write(f"{FILE.name}: {len(papers())} papers, {len(types())} types\n")


def _of_paper(paper: Paper) -> Known:
    ours = {method.kind: method for method in methods.METHODS}
    serving = [ours[kind] for kind in paper.kinds if kind in ours]
    if serving:
        status: Status = "native" if any(method.served == "native" for method in serving) else "folded"
        by = ", ".join(f"`{_type_name(method)}`" for method in serving)
        return Known(paper.name, status, f"{' '.join(method.note for method in serving)} {by}.", paper.source)
    if paper.peft_type:
        return _declined(paper.name, paper.peft_type, paper.source)
    if paper.kinds:
        return Known(paper.name, "declined", "There is no importer yet.", paper.source)
    return Known(paper.name, paper.status, paper.note, paper.source)


def _declined(name: str, peft_type: str, source: str) -> Known:
    reason = methods.DECLINED[peft_type]
    return Known(name, "declined", f"{reason[0].upper()}{reason[1:]}.", source)


def _of_method(name: str, method: Method) -> Known:
    return Known(name, method.served, method.note, method.source)


def _type_name(method: Method) -> str:
    return f"LORA ({method.kind})" if method.peft_type == "LORA" else method.peft_type


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _rows(entries: Iterable[Known]) -> str:
    lines = ["| Method | Served | Note | Source |", "|---|---|---|---|"]
    lines += [f"| {_cell(each.name)} | {each.status} | {_cell(each.note)} | {_cell(each.source)} |" for each in entries]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
