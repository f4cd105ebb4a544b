"""`compress`: a smaller version of an adapter, made and measured by the server."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.client import ClientError
from server.commands.adapters import check_reference, summary
from server.commands.terminal import DEFAULT_URL, JsonOption, NameArgument, UrlOption, connect, say, say_json

Dtype = Annotated[Literal["int8", "native"], typer.Option(help="Type of the factors; native leaves it as it is.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Highest rank that a module keeps.")]
Energy = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of each module's squared norm that its rank must keep.")
]
Target = Annotated[str | None, typer.Option(help="Name of the result; by default it is NAME's next version.")]
Replace = Annotated[bool, typer.Option("--replace", help="Make it the next version if the target holds other content.")]
MaxError = Annotated[float | None, typer.Option(min=0, help="Refuse a larger relative error of the weights.")]
MaxDivergence = Annotated[
    float | None,
    typer.Option(
        min=0, help="Refuse a larger mean KL divergence of answers, in nats; 0.02 if not given, 0.2 over an int8 base."
    ),
]
Probe = Annotated[
    Path | None,
    typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Prompts to measure on, one a line."),
]


def compress(
    name: NameArgument,
    dtype: Dtype = "int8",
    rank: Rank = None,
    energy: Energy = None,
    target: Target = None,
    replace: Replace = False,
    max_error: MaxError = None,
    max_divergence: MaxDivergence = None,
    probe: Probe = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Store a smaller version of NAME (or NAME@VERSION), unless it is too lossy."""
    check_reference(name)
    body: dict[str, Any] = {"dtype": dtype, "replace": replace}
    optional = {
        "rank": rank,
        "energy": energy,
        "target": target,
        "max_error": max_error,
        "max_divergence": max_divergence,
    }
    body |= {key: value for key, value in optional.items() if value is not None}
    if probe is not None:
        body["probe"] = _prompts(probe)
    with connect(url) as client:
        info = client.compress(name, body)
    if as_json:
        say_json(info)
        return
    told = info["compression"]
    divergence, worst = told["divergence"], told["worst_module"]
    say(f"{info['name']}@{info['version']}  {info['digest']}{'' if info['new'] else '  (already there, unchanged)'}")
    say(summary(info))
    say(f"relative error {told['relative_error']:.3g}, at most {worst['relative_error']:.3g} ({worst['name']})")
    say(
        f"KL divergence {divergence['mean_kl']:.3g} nats on average, {divergence['max_kl']:.3g} at most; "
        f"same greedy token at {divergence['same_greedy']:.1%} of {divergence['positions']:.0f} positions"
    )


def _prompts(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ClientError(f"{path} is not UTF-8 text", "bad_probe") from None
    if not found:
        raise ClientError(f"{path} holds no prompts", "bad_probe")
    return found
