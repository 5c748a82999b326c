"""Defines the `distil` command. Each subcommand imports its modules when it is called, so `distil --help` is instant.

The exit status is 0 on success, 1 on failure (with one sentence on standard error) and 2 on a usage error.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import DistilError

if TYPE_CHECKING:
    from tasks.recipe.config import Recipe


BUNDLED = sorted((Path(__file__).resolve().parent.parent / "deployments").glob("*.toml"))
"""The recipe files in deployments/."""

DEMO = next(path for path in BUNDLED if path.name == "demo.toml")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil large masked language models into small, fast ones on web-scale corpora.\n\n"
    "Start with `distil demo`, which runs the complete pipeline on a bundled corpus and teacher in a few minutes.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="Recipe file")]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c ...]", help="Settings that override those of the recipe, such as train.lr=1e-3"),
]


@app.command(epilog="Example:  distil demo train.max_steps=100")
def demo(overrides: Overrides = None) -> None:
    """Run the complete pipeline on the bundled French corpus and teacher, and print where to find the results."""
    run(DEMO, overrides)


@app.command(epilog="Example:  distil run deployments/pilot.toml corpus.url=/data/oscar train.lr=1e-3")
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run the pipeline: shards, blocks, targets, training, registration and scores. Existing artifacts are reused."""
    loaded = _recipe(recipe, overrides)
    from flows.pipeline.local_run import run_distill_unless_done

    run_distill_unless_done(loaded, _command_line(recipe, overrides))


@app.command(epilog="Example:  distil prepare deployments/pilot.toml corpus.pattern='fr_meta_part_1*'")
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Make the missing text shards, token blocks and teacher targets, without training a student."""
    loaded = _recipe(recipe, overrides)
    _run_flow(loaded, "flows.prepare", "prepare", command=_command_line(recipe, overrides))


@app.command(epilog="Example:  distil plan deployments/pilot.toml corpus.url=/data/oscar --price-hour 3.5")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
    price_hour: Annotated[float, typer.Option(min=0, help="Price of this machine per hour")] = 3.5,
    price_tb_month: Annotated[float, typer.Option(min=0, help="Price of storage per TB and month")] = 23.0,
    sample_mb: Annotated[
        float, typer.Option(min=0.1, max=10_000, help="Size of the sample to read from the sources, in MB")
    ] = 4.0,
    prepare: Annotated[bool, typer.Option("--prepare", help="Forecast `distil prepare`, without training")] = False,
) -> None:
    """Forecast the storage, time and cost of a run from a measured sample, without storing anything."""
    loaded = _recipe(recipe, overrides)
    from flows.plan import forecast_of
    from flows.views.forecast import show_forecast
    from tasks.plan.forecast import Prices

    prices = Prices(price_hour, price_tb_month)
    forecast = forecast_of(loaded, sample_bytes=int(sample_mb * 1e6), prices=prices, training=not prepare)
    show_forecast(loaded, forecast, as_json=as_json)


@app.command(epilog="Example:  distil status deployments/pilot.toml --json")
def status(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Show the finished, missing and failed artifacts of each stage."""
    loaded = _recipe(recipe, overrides)
    from flows.home import open_workspace
    from flows.inventory import stage_rows
    from flows.views.status import show_status

    show_status(loaded, stage_rows(open_workspace(loaded)), as_json=as_json)


@app.command(epilog="Example:  distil retry deployments/pilot.toml --stage targets --shard fr_meta_part_3-0002")
def retry(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stage: Annotated[
        str, typer.Option(help="Stage to retry: source, shard, blocks, counts, calibration, targets or all")
    ] = "all",
    shard: Annotated[str, typer.Option(help="Label of the shard or source, as `distil status` shows it")] = "",
    force: Annotated[bool, typer.Option("--force", help="Make the artifacts again even if they exist")] = False,
) -> None:
    """Make the missing artifacts up to the targets: all of them, or those of one stage or one shard."""
    loaded = _recipe(recipe, overrides)
    command = _command_line(recipe, overrides)
    _run_flow(loaded, "flows.retry", "retry_shard", stage=stage, shard=shard, force=force, command=command)


@app.command(epilog="Example:  distil watch deployments/pilot.toml watch.folder=/data/oscar")
def watch(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check once for a new snapshot of the corpus and start a run of the deployment `distill/NAME` for it."""
    loaded = _recipe(recipe, overrides)
    from flows.services.servers import find_server

    find_server(loaded.home)  # a server that ends with this command would never start the run
    _run_flow(loaded, "flows.watch", "watch_snapshots")


@app.command(epilog="Example:  distil verify deployments/pilot.toml")
def verify(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Hash every file of the store, mark damaged artifacts as missing, and list the recipe's missing artifacts."""
    loaded = _recipe(recipe, overrides)
    from flows.home import open_workspace
    from flows.verify import verify_store

    verify_store(open_workspace(loaded), _command_line(recipe, overrides))


@app.command(epilog="Example:  distil gc deployments/pilot.toml corpus.url=/data/oscar --delete")
def gc(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.toml... [a.b=c ...]",
            help="Recipes whose artifacts are kept, and settings that override those of every recipe",
        ),
    ],
    delete: Annotated[bool, typer.Option("--delete", help="Delete the files instead of listing them")] = False,
) -> None:
    """List (or delete) files older than a day that no given recipe, model or unfinished training run refers to."""
    recipes, overrides, others = _split_arguments(arguments)
    if others or not recipes:
        raise typer.BadParameter("expected one or more recipe files, and settings", param_hint="RECIPE.toml...")
    loaded = [_recipe(Path(path), overrides) for path in recipes]
    from flows.garbage_collection import collect_garbage

    collect_garbage(loaded, delete=delete)


@app.command(epilog="Example:  distil deploy deployments/pilot.toml --notify custom-webhook/on-call")
def deploy(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECIPE.toml ...]", help="Recipe files; default: all bundled recipes"),
    ] = None,
    pool: Annotated[str, typer.Option(help="Work pool that starts the runs; created if it does not exist")] = "distil",
    pool_type: Annotated[str, typer.Option(help="Type of the work pool: process, docker or kubernetes")] = "process",
    image: Annotated[str, typer.Option(help="Container image of the runs, for a docker or kubernetes pool")] = "",
    notify: Annotated[
        str, typer.Option(metavar="TYPE/NAME", help="Prefect notification block that reports failed runs")
    ] = "",
) -> None:
    """Register the flows of recipes with a Prefect server, so that its UI can start, schedule and retry them."""
    loaded = [_recipe(path, None) for path in recipes or BUNDLED]
    from flows.services.servers import find_server

    find_server(loaded[0].home)
    from flows.services import deploy as deployment

    deployment.show(deployment.deploy(loaded, deployment.WorkPool(pool, pool_type, image), notify))


@app.command(
    epilog="Example:  distil score .distil/models/demo almanach/camembert-base "
    "--protocol deployments/score/small.toml score.sets=/data/eval"
)
def score(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [RECIPE.toml] [a.b=c ...]",
            help="Models (folders, hub ids or models:/NAME@ALIAS), at most one recipe with the held-out text, the "
            "teacher and the settings (default: the demo recipe), and settings that override those of the recipe",
        ),
    ],
    protocol: Annotated[
        Path | None,
        typer.Option(help="Protocol file of the fine-tuned data sets; default: the recipe's"),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Compute only this data set (xnli), or one seed of it ('xnli seed 1')")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Compute the scores of --only again even if they exist")
    ] = False,
) -> None:
    """Score masked language models and the recipe's teacher side by side.

    Reports held-out scores, fill-mask answers, size, latency and, with a protocol, scores after fine-tuning, in one
    table with confidence intervals.
    """
    recipes, overrides, models = _split_arguments(arguments)
    if not models or len(recipes) > 1:
        raise typer.BadParameter("expected at least one model and at most one recipe", param_hint="MODEL...")
    if protocol:
        import json

        overrides.append(f"score.protocol={json.dumps(str(protocol.absolute()))}")
    path = Path(recipes[0]) if recipes else DEMO
    loaded = _recipe(path, overrides)
    scoring = {"model": models[0], "others": tuple(models[1:]), "only": only, "force": force}
    _run_flow(loaded, "flows.score", "score", **scoring, command=_command_line(path, overrides))


@app.command(epilog="Example:  distil up deployments/pilot.toml --port 4200 --mlflow-port 5000")
def up(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECIPE.toml ...]", help="Recipe files to register; default: all bundled recipes"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of Prefect; default: 4200, or any free port")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of MLflow; default: 5000, or any free port")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder of all local state; default: the home in the recipes (.distil)")
    ] = None,
) -> None:
    """Serve Prefect, MLflow and a worker with all deployments until Ctrl-C.

    The servers listen only on the loopback interface; for several machines see docker/.
    """
    from flows.services.up import serve
    from tasks.recipe.load import load_recipe

    overrides = [f"home={home.absolute()}"] if home else []
    serve([load_recipe(path, overrides) for path in recipes or BUNDLED], port, mlflow_port)


@app.command(epilog='Example:  distil promote deployments/pilot.toml --version 3 --force --reason "wrong labels"')
def promote(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: Annotated[
        str, typer.Option(help="Name of the registered model, as a check; must be the model that the recipe registers")
    ] = "",
    version: Annotated[str, typer.Option(help="Version number; default: the challenger")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if the version fails the gate; requires --reason")
    ] = False,
    reason: Annotated[str, typer.Option(help="Reason for --force; stored with the version")] = "",
) -> None:
    """Promote a version of the recipe's model to champion if it passes the gate.

    Otherwise print the reasons and exit with status 1.
    """
    loaded = _recipe(recipe, overrides)
    from flows.home import user

    arguments = {"model": model, "version": version, "force": force, "reason": reason}
    _run_flow(loaded, "flows.promote", "promote", **arguments, by=user())


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits arguments into recipe files, settings and all others. Each list keeps the order of the arguments."""
    overrides = [one for one in arguments if re.match(r"[\w.-]+=", one)]  # runs/lr=1e-3/model is a folder
    recipes = [one for one in arguments if one.endswith(".toml") and one not in overrides]
    return recipes, overrides, [one for one in arguments if one not in (*recipes, *overrides)]


def _run_flow(recipe: "Recipe", module: str, flow: str, **arguments: Any) -> None:
    from flows.pipeline.local_run import run_flow

    run_flow(recipe, module, flow, **arguments)


def _recipe(path: Path, overrides: Sequence[str] | None) -> "Recipe":
    """Loads the recipe and sets the variables that Prefect, MLflow and transformers read when they are imported."""
    from flows.home import set_environment
    from flows.services.servers import join_up
    from tasks.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or ())
    set_environment(recipe.home)
    if not os.environ.get("PREFECT_API_URL"):
        join_up(recipe.home)  # also for commands that read MLflow outside a flow, such as a warm start
    return recipe


def _command_line(path: Path, overrides: Sequence[str] | None) -> str:
    """Returns the recipe file and settings as typed, quoted for a shell. The tables print commands with them."""
    return shlex.join([os.path.relpath(path) if path == DEMO else str(path), *(overrides or ())])


def main() -> None:
    """Runs the command line. On an expected error it prints one sentence, without a traceback, and exits with 1."""
    try:
        app()
    except DistilError as error:
        print(f"distil: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
