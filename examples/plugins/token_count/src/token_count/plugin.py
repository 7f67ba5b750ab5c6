"""Declaration of the job. kdcore imports this module when it starts: do not import torch."""

from collections.abc import Iterable

from kdcore import Job, hookimpl


@hookimpl
def kdcore_jobs() -> Iterable[Job]:
    """Declare the job."""
    yield Job(
        name="count-tokens",
        summary="Count the tokens of a data source.",
        about="The run folder then contains counts.json.\n\n"
        "For example:\n\nkdcore count-tokens counts.yaml",
        model="token_count.spec:CountSpec",
        work="token_count.count:count",
        preflight="token_count.count:preflight",
        template="token_count:starter/count-tokens.yaml",
        result="counts.json",
    )
