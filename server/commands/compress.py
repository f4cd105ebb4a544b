"""`compress`: smaller versions of adapters, made and measured by the server."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.commands.adapters import check_reference, summary
from server.commands.terminal import DEFAULT_URL, JsonOption, UrlOption, UsageError, connect, say, say_json, say_version
from server.commands.texts import lines_of

Names = Annotated[
    list[str], typer.Argument(metavar="NAME...", help="The adapter's name; several with --method.", show_default=False)
]
Dtype = Annotated[
    Literal["int8", "int4", "native"] | None,
    typer.Option(help="Type of the factors, int8 if not given; native leaves it as it is."),
]
Method = Annotated[
    Literal["jd-full", "jd-diag"] | None,
    typer.Option(help="Compress several adapters together: a core of --rank x --rank for each, or a diagonal."),
]
Clusters = Annotated[int | None, typer.Option(min=1, help="With --method: how many shared bases, 1 if not given.")]
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
    names: Names,
    dtype: Dtype = None,
    rank: Rank = None,
    energy: Energy = None,
    target: Target = None,
    replace: Replace = False,
    method: Method = None,
    clusters: Clusters = None,
    max_error: MaxError = None,
    max_divergence: MaxDivergence = None,
    probe: Probe = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Store a smaller version of NAME (or NAME@VERSION), or with --method of each NAME, unless it is too lossy."""
    for name in names:
        check_reference(name)
    alone = {"dtype": dtype, "energy": energy, "target": target, "replace": replace or None}
    together = {"method": method and method.replace("-", "_"), "clusters": clusters}
    _check_options(names, method, alone if method else together, rank)
    order: dict[str, Any] = {"rank": rank, "max_error": max_error, "max_divergence": max_divergence}
    order |= together if method else alone
    order = {key: value for key, value in order.items() if value is not None}
    if probe is not None:
        order["probe"] = lines_of(probe, "bad_probe")
    with connect(url) as client:
        made = client.compress_jointly(order | {"adapters": names}) if method else [client.compress(names[0], order)]
    if as_json:
        say_json({"adapters": made} if method else made[0])
        return
    for info in made:
        _tell(info)


def _check_options(names: list[str], method: str | None, out_of_place: dict[str, Any], rank: int | None) -> None:
    """Raises UsageError for options that do not go together."""
    if method is None and len(names) > 1:
        raise UsageError("several names are compressed together, by a --method", param_hint="NAME")
    if method is not None and rank is None:
        raise UsageError("--method needs a --rank", param_hint="--rank")
    for option, value in out_of_place.items():
        if value is not None:
            text = f"--{option} does not go {'with' if method else 'without'} --method"
            raise UsageError(text, param_hint=f"--{option}")


def _tell(info: dict[str, Any]) -> None:
    told = info["compression"]
    divergence, worst = told["divergence"], told["worst_module"]
    say_version(info, info["new"])
    say(summary(info))
    say(f"relative error {told['relative_error']:.3g}, at most {worst['relative_error']:.3g} ({worst['name']})")
    say(
        f"KL divergence {divergence['mean_kl']:.3g} nats on average, {divergence['max_kl']:.3g} at most; "
        f"same greedy token at {divergence['same_greedy']:.1%} of {divergence['positions']:.0f} positions"
    )
