"""The command line: argument handling and nothing else.

Every verb takes YAML files (`-c`), `key.sub=value` overrides and `--dry-run`. Heavy imports happen inside
the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pipelines.config import Config

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain and compare contrastive image-text methods on a Ray cluster.",
)
data_app = typer.Typer(no_args_is_help=True, help="Check a source, count prepared data, show rows.")
app.add_typer(data_app, name="data")
console = Console()
# Apart from what a verb prints, which may go into a file.
error_console = Console(stderr=True)

Files = Annotated[list[str] | None, typer.Option("--config", "-c", help="YAML file; right-most wins.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any config value, as key.sub=value.")]
Source = Annotated[
    str | None,
    typer.Option(
        help="scenes:quick, scenes:tokens, or <kind>:<place>, local or s3://, with one of the kinds parquet, "
        "webdataset, csv, hf, coco, folder, mixture, chexpert, mimic-cxr."
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="Run root: local path or s3://bucket/key.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command(epilog="Example: clipfleet sweep --methods clip,cloob sweep.num_trials=8")
def sweep(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated method names.")] = None,
    output: Output = None,
    dry_run: DryRun = False,
) -> None:
    """Tune methods with equal budgets, re-run the best of each with fresh seeds, rank them, report."""
    with _clear_errors():
        settings = _load(config, overrides, source=source, output=output, methods=methods)
        from pipelines.stages import sweep_stage

        sweep_stage(settings, console, dry_run=dry_run)


@app.command(epilog="Example: clipfleet pretrain --method cloob train.num_workers=2 --output runs/cloob")
def pretrain(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    method: Annotated[str | None, typer.Option(help="Method of the catalogue.")] = None,
    output: Output = None,
    local: Annotated[bool, typer.Option("--local", help="One plain process, no Ray Train.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train one method on Ray Train workers and evaluate it; the same command resumes a killed run."""
    with _clear_errors():
        settings = _load(config, overrides, source=source, output=output, method=method)
        from pipelines.stages import pretrain_stage

        pretrain_stage(settings, console, local=local, dry_run=dry_run)


@app.command(epilog="Example: clipfleet prepare --source parquet:pairs.parquet data.image_size=64")
def prepare(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    dry_run: DryRun = False,
) -> None:
    """Check, resize and tokenise image-text pairs into shards; unusable rows are set aside and counted."""
    with _clear_errors():
        settings = _load(config, overrides, source=source)
        from pipelines.stages import prepare_stage

        prepare_stage(settings, console, dry_run=dry_run)


@app.command(epilog="Example: clipfleet evaluate runs/cloob --split selection evaluation.resamples=5000")
def evaluate(
    run: Annotated[str, typer.Argument(help="A run root, or the folder of one run below <root>/runs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values below evaluation, as key=value.")
    ] = None,
    split: Annotated[str, typer.Option(help="selection or test.")] = "test",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score the newest checkpoint of a run on a split and print every metric with its interval."""
    with _clear_errors():
        from pipelines.stages import evaluate_stage

        evaluate_stage(run, overrides or [], console, split=split, dry_run=dry_run, as_json=as_json)


@app.command(epilog="Example: clipfleet score runs/aclip --output scored/birds")
def score(
    run: Annotated[str, typer.Argument(help="A run root, or the folder of one run below <root>/runs.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where the data with scores is written.")],
    data: Annotated[
        str | None, typer.Option(help="Prepared data to score; default: what the run was trained on.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Score every image's patches once with a finished run; train on the result with scoring.mode=offline."""
    with _clear_errors():
        from pipelines.stages_score import score_stage

        score_stage(run, output, console, data=data, dry_run=dry_run)


@app.command(epilog="Example: clipfleet results runs/quick --csv > results.csv")
def results(
    root: Annotated[str, typer.Argument(help="Run root.")] = "runs/quick",
    csv: Annotated[bool, typer.Option("--csv", help="Every metric of every run as CSV.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Print the ranked table of a run root, or export all its results."""
    with _clear_errors():
        from pipelines.stages import results_stage

        results_stage(root, console, csv=csv, as_json=as_json, dry_run=dry_run)


@app.command(epilog="Example: clipfleet report runs/quick --output site")
def report(
    root: Annotated[str, typer.Argument(help="Run root.")] = "runs/quick",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder; default <root>/report.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the report: a static folder that opens without a server or a network."""
    with _clear_errors():
        from pipelines.stages import report_stage

        report_stage(root, console, output=output, dry_run=dry_run)


methods_app = typer.Typer(rich_markup_mode="rich")
app.add_typer(methods_app, name="methods")


@methods_app.callback(invoke_without_command=True, epilog="Example: clipfleet methods show cloob")
def methods(context: typer.Context, as_json: AsJson = False) -> None:
    """List the methods: source, evidence, what differs from CLIP; and what has no recipe."""
    if context.invoked_subcommand is not None:
        return
    with _clear_errors():
        from pipelines.method_tables import show_methods

        show_methods(console, as_json=as_json)


@methods_app.command(name="show", epilog="Example: clipfleet methods show cloob")
def show_one(
    name: Annotated[str, typer.Argument(help="Name in the catalogue.")], as_json: AsJson = False
) -> None:
    """Print one method's card and search space."""
    with _clear_errors():
        from pipelines.method_tables import show_method

        show_method(name, console, as_json=as_json)


@data_app.command(name="check", epilog="Example: clipfleet data check --source csv:pairs.csv --rows 5000")
def data_check(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    rows: Annotated[int, typer.Option(help="Rows to look at, spread over the source.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """Look at a source before anything is prepared; exit code 1 when it cannot be used as it is."""
    with _clear_errors():
        settings = _load(config, overrides, source=source)
        from pipelines.data_stages import check_stage

        raise typer.Exit(check_stage(settings, console, max_rows=rows, as_json=as_json))


@data_app.command(name="stats", epilog="Example: clipfleet data stats --source parquet:pairs.parquet")
def data_stats(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    as_json: AsJson = False,
) -> None:
    """Count what prepared data holds, by split; prepares it when it is not there."""
    with _clear_errors():
        settings = _load(config, overrides, source=source)
        from pipelines.data_stages import stats_stage

        stats_stage(settings, console, as_json=as_json)


@data_app.command(name="show", epilog="Example: clipfleet data show --run runs/aclip --output sheet.png")
def data_show(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    output: Annotated[str, typer.Option("--output", "-o", help="PNG file to write.")] = "contact_sheet.png",
    split: Annotated[str, typer.Option(help="train, selection or test.")] = "train",
    rows: Annotated[int, typer.Option(help="Rows on the sheet.")] = 24,
    run: Annotated[str | None, typer.Option(help="A finished run whose kept patches are drawn.")] = None,
) -> None:
    """Draw rows with captions, boxes and, given a run, the patches it keeps."""
    with _clear_errors():
        settings = _load(config, overrides, source=source)
        from pipelines.data_stages import show_stage

        show_stage(settings, console, output=output, split=split, num_rows=rows, run=run)


@app.command(epilog="Example: clipfleet doctor")
def doctor(
    output: Annotated[str, typer.Option("--output", "-o", help="Run root to check for space.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Check the environment and name the fix of whatever is wrong."""
    with _clear_errors():
        from pipelines.doctor import run_doctor

        raise typer.Exit(run_doctor(output, json=as_json))


@app.command(name="config", epilog="Example: clipfleet config method=tier > tier.yaml")
def show_config(
    overrides: Overrides = None,
    config: Files = None,
    source: Source = None,
    schema: Annotated[bool, typer.Option("--schema", help="JSON Schema, for editors.")] = False,
) -> None:
    """Print the resolved configuration as YAML."""
    with _clear_errors():
        import json

        import yaml

        from pipelines.config import Config

        if schema:
            print(json.dumps(Config.model_json_schema(), indent=1))
            return
        print(yaml.safe_dump(_load(config, overrides, source=source).tree(), sort_keys=False), end="")


def _load(
    files: list[str] | None,
    overrides: list[str] | None,
    *,
    source: str | None = None,
    output: str | None = None,
    method: str | None = None,
    methods: str | None = None,
) -> Config:
    from pipelines.config_tree import load_config

    options: list[str] = []
    if source is not None:
        options.append(f"data.source={source}")
    if output is not None:
        options.append(f"output={output}")
    if method is not None:
        options.append(f"method.name={method}")
    if methods is not None:
        options.append(f"sweep.methods=[{methods}]")
    return load_config(files or (), [*options, *(overrides or ())])


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """What the user can mend is one message and exit code 2, not a stack trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        _say(_with_advice(str(error)))
        raise typer.Exit(2) from error
    except OSError as error:
        if "AWS Error" not in str(error):
            raise
        _say(_with_advice(str(error)))
        raise typer.Exit(2) from error


# A denied request has no body to read a reason from.
_S3_ADVICE = (
    "Check the bucket's name and region, the endpoint_override of the URI, and AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY (or the instance's role); anonymous=true reads public data"
)


def _with_advice(message: str) -> str:
    """What storage says, and what to look at."""
    return f"{message.rstrip(' .')}. {_S3_ADVICE}" if "AWS Error" in message else message


def _say(message: str) -> None:
    error_console.print("[bold red]error:[/bold red]", end=" ")
    error_console.print(message, markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of `clipfleet`."""
    return app(arguments if arguments is not None else sys.argv[1:])
