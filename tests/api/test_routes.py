"""What holds for all routes: who is asking, and a schema that says what they answer."""

from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS

from server.api.errors import ERROR_TYPES


def operations(api: FastAPI) -> list[tuple[str, str, dict[str, Any]]]:
    paths = api.openapi()["paths"]
    return [(path, method, found) for path, methods in paths.items() for method, found in methods.items()]


def test_every_route_says_what_it_answers(api: FastAPI) -> None:
    for path, method, operation in operations(api):
        assert operation["description"], (method, path)
        for status, answer in operation["responses"].items():
            if status == "204":
                continue
            content = answer["content"]
            if int(status) >= 400:
                assert set(content) == {"application/json"}, (method, path, status)
                reference = content["application/json"]["schema"]["$ref"]
                tgi = path in ("/", "/generate", "/generate_stream")
                assert reference.endswith("TgiErrorAnswer" if tgi else "/ErrorAnswer")
                assert int(status) in ERROR_TYPES or int(status) in (424, 500)
            elif "application/json" in content and "files" not in path:
                assert content["application/json"]["schema"], (method, path)


def test_operations_have_distinct_names(api: FastAPI) -> None:
    names = [operation["operationId"] for _, _, operation in operations(api)]
    assert len(set(names)) == len(names)


# Checks that our contract answers otherwise: unknown extras are ignored on purpose (see openai_sampling), and a name or
# a body that fits the schema may still mean nothing.
NOT_OURS = {"negative_data_rejection", "positive_data_acceptance", "missing_required_header", "unsupported_method"}
QUIET = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def test_answers_fit_the_schema(api: FastAPI) -> None:
    """Generated requests, well-formed and not: no 5xx, and every answer is of a documented kind."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    excluded = [check for check in CHECKS.get_all() if check.__name__ in NOT_OURS]
    for found in schema.get_all_operations():

        @QUIET
        @given(case=found.ok().as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=excluded)

        check()
