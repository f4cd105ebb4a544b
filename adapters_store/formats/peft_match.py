"""Which base modules a PEFT config selects, and with which rank and alpha: PEFT 0.21's rules, on an RE2 engine.

RE2 matches in linear time, so a hostile pattern cannot stall the server; what it lacks (look-around, back-references)
is refused with `bad_config`. Source: `peft.tuners.tuners_utils.check_target_module_exists`, `_maybe_include_all_linear_
layers` and `peft.utils.other.get_pattern_key`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import re2

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import BaseSpec

MAX_PATTERNS = 2000
_MEMORY = 64 << 20  # bytes that one compiled pattern or set may take


class Matcher:
    """Answers for one config and one base model. `outer` is what the adapter's own module names leave out in front."""

    def __init__(self, config: TunerConfig, base: BaseSpec, outer: str = "") -> None:
        self.config = config
        self._outer = outer
        self._base = base
        self._targets = _Names(config.target_modules or [])
        self._excluded = _Names(config.exclude_modules or [])
        self._saved = _PatternSet(rf"^(?:(?:^|.*\.){name}(?:$|\..*))" for name in config.modules_to_save or [])
        self._rank_set = _PatternSet(_key_pattern(key) for key in config.rank_pattern or {})
        self._alpha_set = _PatternSet(_key_pattern(key) for key in config.alpha_pattern or {})
        self._layers = [_compile(pattern) for pattern in _layer_patterns(config)]

    def targeted(self) -> set[str]:
        """Full names of the base modules that the config selects."""
        return {name for name in self._base.modules if name.startswith(self._outer) and self._selects(name)}

    def rank(self, module: str) -> int:
        return int(self._pattern_value(self.config.rank_pattern or {}, self._rank_set, module, self.config.r))

    def alpha(self, module: str, default: float) -> float:
        """default: the config's own alpha."""
        return float(self._pattern_value(self.config.alpha_pattern or {}, self._alpha_set, module, default))

    def unused_targets(self) -> list[str]:
        """Entries of a `target_modules` list that select nothing in the base."""
        if isinstance(self.config.target_modules, str):
            return []
        suffixes = {suffix for name in self._base.modules for suffix in dotted_suffixes(name)}
        return sorted(set(self.config.target_modules or []) - suffixes)

    def saved_entries(self) -> list[str]:
        """Entries of `modules_to_save` other than the output head."""
        head = self._base.head or ""
        allowed = {head, head.rpartition(".")[2]} - {""}
        return [entry for entry in self.config.modules_to_save or [] if entry not in allowed]

    def _selects(self, full_name: str) -> bool:
        name = full_name.removeprefix(self._outer)
        if self._excluded.matches(name) or self._saved.first(name) is not None:
            return False
        targets = self.config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return self._base.modules[full_name].kind != "embedding" and full_name != self._base.head
        if not self._targets.matches(name):
            return False
        if isinstance(targets, str) or name in (targets or []):
            return True
        return self._layer_selected(name)

    def _layer_selected(self, name: str) -> bool:
        layers = self.config.layers_to_transform
        if layers is None or layers == []:
            return True
        for pattern in self._layers:
            if match := pattern.match(name):
                index = int(match.group("idx") or -1)  # an alternation in the pattern may match without a number
                return index == layers if isinstance(layers, int) else index in layers
        return False

    def _pattern_value(
        self, values: Mapping[str, float], patterns: "_PatternSet", module: str, default: float
    ) -> float:
        name = module.removeprefix(self._outer)
        index = patterns.first(name)
        return values.get(name, default) if index is None else list(values.values())[index]


class _Names:
    """A list of dotted suffixes, or one regular expression for the whole name."""

    def __init__(self, wanted: list[str] | str) -> None:
        self._regex = _compile(wanted) if isinstance(wanted, str) and wanted.lower() != "all-linear" else None
        self._list = frozenset(wanted) if isinstance(wanted, list) else frozenset()

    def matches(self, name: str) -> bool:
        if self._regex is not None:
            return self._regex.fullmatch(name) is not None
        return any(suffix in self._list for suffix in dotted_suffixes(name))


class _PatternSet:
    """Several patterns in one automaton: the first that matches wins, as in PEFT's loop over a dict."""

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = list(patterns)
        self._set = None
        if not listed:
            return
        if len(listed) > MAX_PATTERNS:
            raise _bad(f"has {len(listed)} patterns; the limit is {MAX_PATTERNS}")
        self._set = re2.Set.SearchSet(_options())
        for pattern in listed:
            _compile(pattern)  # its errors say more than those of the set
            self._set.Add(pattern)
        try:
            self._set.Compile()
        except re2.error:
            raise _bad("has patterns that are too large together") from None

    def first(self, name: str) -> int | None:
        found = self._set.Match(name) if self._set is not None else []
        return min(found) if found else None


def dotted_suffixes(name: str) -> Iterator[str]:
    """`a.b.c` gives `a.b.c`, `b.c` and `c`."""
    while True:
        yield name
        if "." not in name:
            return
        name = name.partition(".")[2]


def _key_pattern(key: str) -> str:
    return rf"^(?:(?:.*\.)?(?:{key})$)"


def _layer_patterns(config: TunerConfig) -> list[str]:
    if not config.layers_pattern:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    listed = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if any("idx" in _compile(pattern).groupindex for pattern in listed):
        raise _bad("names a group `idx` in `layers_pattern`")
    return [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in listed]


def _options() -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    return options


def _compile(pattern: str) -> Any:
    try:
        return re2.compile(pattern, _options())
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if error.args else "unknown"
        raise _bad(f"has the pattern `{shorten(pattern, 60)}`, which RE2 cannot run ({shorten(reason, 60)})") from None


def _bad(problem: str) -> AdapterInvalid:
    message = f"adapter_config.json {problem}; write plain module names instead."
    return AdapterInvalid(message, code="bad_config", param="config")
