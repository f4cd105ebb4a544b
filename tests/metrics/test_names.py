"""The list of names is what a server exports: no more, no less, with those types, labels and meanings."""

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import names
from tests.metrics.support import everything, samples

LISTED = [name for group in names.GROUPS.values() for name in group]


def test_what_is_exported_is_listed() -> None:
    families = {family.name: family for family in text_string_to_metric_families(everything().render().decode())}
    made = {f"{name.name}_created" for name in LISTED}  # when a series began: the client library adds them
    assert families.keys() - made == {name.name for name in LISTED}
    for name in LISTED:
        family = families[name.name]
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert (family.type, family.documentation, labels) == (name.kind, name.text, set(name.labels)), name.name


def test_names_are_those_of_their_types() -> None:
    assert len({name.name for name in LISTED}) == len(LISTED)
    for name in LISTED:
        assert name.name.startswith(("polyrank_", "vllm:"))
        assert not name.name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert name.text.endswith(".")


def test_vllm_times_are_ours_over_all_endpoints() -> None:
    metrics = everything()
    for endpoint in ("chat", "completions"):
        metrics.generation(endpoint, 1).done()
    found = samples(metrics)
    model = ("model_name", "tiny")
    assert found["vllm:e2e_request_latency_seconds_count", (model,)] == 3
    assert found["vllm:time_to_first_token_seconds_count", (model,)] == 1
    assert found["vllm:request_success_total", (("finished_reason", "abort"), model)] == 2
    for le in ("0.01", "+Inf"):
        ours = [
            value
            for (name, labels), value in found.items()
            if name == "polyrank_generation_seconds_bucket" and ("le", le) in labels
        ]
        assert found["vllm:e2e_request_latency_seconds_bucket", (("le", le), model)] == sum(ours)
