"""The `distil` command. Every command imports what it needs when it is called, so that `distil --help` is instant.

Exit status: 0 done, 1 failed (one sentence on standard error), 2 bad usage.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import DistilError

if TYPE_CHECKING:
    from tasks.recipe.config import Recipe


DEMO = Path(__file__).resolve().parent.parent / "deployments" / "demo.toml"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil large masked language models into small fast ones, on corpora of web size, again and again.\n\n"
    "Begin with `distil demo`: the whole chain on a bundled corpus and teacher, in a few minutes.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="Recipe file")]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings over those of the recipe: train.lr=1e-3")
]


@app.command(epilog="Example:  distil demo train.max_steps=100")
def demo(overrides: Overrides = None) -> None:
    """Run the whole chain on the bundled French corpus and teacher, and say where to look."""
    _run(_recipe(DEMO, overrides))


@app.command(epilog="Example:  distil run deployments/pilot.toml corpus.url=/data/oscar train.lr=1e-3")
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run the whole chain: shards, blocks, targets, training, registration, scores. Only what is missing is made."""
    _run(_recipe(recipe, overrides))


@app.command(epilog="Example:  distil prepare deployments/pilot.toml corpus.pattern='fr_meta_part_1*'")
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Make shards, blocks and targets; train nothing."""
    loaded = _recipe(recipe, overrides)
    _flow(loaded, "flows.prepare", "prepare", loaded)


@app.command(epilog="Example:  distil plan deployments/pilot.toml corpus.url=/data/oscar --price-hour 3.5")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
    price_hour: Annotated[float, typer.Option(min=0, help="Price of an hour of this machine")] = 3.5,
    price_tb_month: Annotated[float, typer.Option(min=0, help="Price of a terabyte kept for a month")] = 23.0,
    sample_mb: Annotated[float, typer.Option(min=0.1, max=10_000, help="MB of the sources that are read for it")] = 4.0,
    prepare: Annotated[bool, typer.Option("--prepare", help="What `distil prepare` makes: no training")] = False,
) -> None:
    """Say what a run will take in bytes, hours and money, from a measured sample; nothing is kept."""
    loaded = _recipe(recipe, overrides)
    from flows import plan as view
    from flows.views import forecast as forecast_view
    from tasks.plan.forecast import Prices

    prices = Prices(price_hour, price_tb_month)
    forecast = view.forecast_of(loaded, sample_bytes=int(sample_mb * 1e6), prices=prices, training=not prepare)
    if as_json:
        import json

        print(json.dumps(forecast.to_json(), indent=1, ensure_ascii=False))
    else:
        forecast_view.show(loaded, forecast)


@app.command(epilog="Example:  distil status deployments/pilot.toml --json")
def status(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Show what is done, missing and failed, stage by stage."""
    loaded = _recipe(recipe, overrides)
    from flows import inventory
    from flows.home import open_store
    from flows.views import status as view

    rows = inventory.stage_rows(open_store(loaded), loaded)
    if as_json:
        import json

        print(json.dumps(view.as_json(rows), indent=1, ensure_ascii=False))
    else:
        view.show(loaded, rows)


@app.command(epilog="Example:  distil retry deployments/pilot.toml --stage targets --shard fr_meta_part_3-0002")
def retry(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="source, shard, blocks, counts, calibration, targets, or all")] = "all",
    shard: Annotated[str, typer.Option(help="Label as `distil status` shows it")] = "",
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it is there")] = False,
) -> None:
    """Try again all that is missing up to the targets, or one stage, or one shard."""
    loaded = _recipe(recipe, overrides)
    _flow(loaded, "flows.retry", "retry_shard", loaded, stage, shard, force)


@app.command(epilog="Example:  distil watch deployments/pilot.toml watch.folder=/data/oscar")
def watch(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Look once for a new snapshot of the corpus, and start a run of the deployment `distill/NAME` for it."""
    loaded = _recipe(recipe, overrides)
    from flows.services.servers import find_server

    find_server(loaded.home)  # a server that ends with this command would never start the run
    _flow(loaded, "flows.watch", "watch_snapshots", loaded)


@app.command(epilog="Example:  distil verify deployments/pilot.toml")
def verify(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Hash every file of the store again, withdraw what is not whole, and name what the recipe lacks."""
    loaded = _recipe(recipe, overrides)
    from flows import inventory
    from flows.home import TYPED_COMMAND, open_store
    from flows.views import status as view
    from storage.maintenance import verify as check

    store = open_store(loaded)
    faults = check(store)
    for fault in faults:
        print(f"{fault.what:<8} {view.named(fault.ref.kind, fault.ref.label, fault.reason)}")
    damaged = {(fault.ref.kind, fault.ref.label) for fault in faults}
    lacking = [
        (row.stage, label)
        for row in inventory.stage_rows(store, loaded)
        for label in (*row.missing, *row.failed)
        if (row.stage, label) not in damaged
    ]
    for kind, label in lacking:
        print(f"missing  {kind} {label}")
    withdrawn = sum(fault.withdrawn for fault in faults)
    if unread := sum(fault.what == "unread" for fault in faults):
        print(f"{unread} could not be read and are left as they are; give access, or mend the disk, and verify again")
    if withdrawn or lacking:
        raise DistilError(
            f"{withdrawn} damaged and withdrawn, {len(lacking)} missing; "
            f"`distil retry {os.environ[TYPED_COMMAND]}` makes them again"
        )
    if stuck := sum(fault.what == "damaged" and not fault.withdrawn for fault in faults):
        raise DistilError(f"{stuck} damaged, but could not be withdrawn; verify again with the right to write")
    if unread:
        raise DistilError(f"{unread} could not be read, so it is not known whether they are whole")
    if faults:
        raise DistilError(f"{len(faults)} files in the store are none of its own; delete them")
    print("all that is there is whole, and nothing is missing")


@app.command(epilog="Example:  distil gc deployments/pilot.toml corpus.url=/data/oscar --delete")
def gc(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.toml... [a.b=c ...]",
            help="Recipes whose artifacts are kept, and settings over those of each of them",
        ),
    ],
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it they are only listed")] = False,
) -> None:
    """List (or delete) files older than a day that no given recipe, no model and no training that goes on refers to."""
    recipes, overrides, others = _sorted_words(words)
    if others or not recipes:
        raise typer.BadParameter("name recipe files and settings only", param_hint="RECIPE.toml...")
    loaded = [_recipe(Path(path), overrides) for path in recipes]
    from flows import inventory
    from flows.home import open_store
    from storage.maintenance import gc as sweep

    if len({recipe.store for recipe in loaded}) > 1:
        raise DistilError("these recipes keep their artifacts in different stores; call gc once for each store")
    store = open_store(loaded[0])
    doomed = sweep(store, inventory.artifacts_to_keep(store, loaded), delete=delete)
    for path in doomed:
        print(path)
    print(f"{len(doomed)} files {'deleted' if delete else 'would be deleted; add --delete to do it'}", file=sys.stderr)


@app.command(epilog="Example:  distil deploy deployments/pilot.toml --notify custom-webhook/on-call")
def deploy(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECIPE.toml ...]", help="Recipe files; all bundled ones if left out"),
    ] = None,
    pool: Annotated[str, typer.Option(help="Work pool that starts the runs; made if it is not there")] = "distil",
    pool_type: Annotated[str, typer.Option(help="process, docker or kubernetes")] = "process",
    image: Annotated[str, typer.Option(help="Image that a docker or kubernetes pool starts runs in")] = "",
    notify: Annotated[str, typer.Option(metavar="TYPE/NAME", help="Block that is told of failed runs")] = "",
) -> None:
    """Register the flows of recipes with a Prefect server, to be started, scheduled and retried in its UI."""
    loaded = [_recipe(path, None) for path in recipes or sorted(DEMO.parent.glob("*.toml"))]
    from flows.services.servers import find_server

    find_server(loaded[0].home)
    from flows.services import deploy as deployment

    deployment.show(deployment.deploy(loaded, deployment.WorkPool(pool, pool_type, image), notify))


@app.command(
    epilog="Example:  distil score .distil/models/demo almanach/camembert-base "
    "--protocol deployments/score/small.toml score.sets=/data/eval"
)
def score(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [RECIPE.toml] [a.b=c ...]",
            help="Models: folders, hub ids or models:/NAME@ALIAS. A recipe whose text, teacher and settings are taken; "
            "the demo's if left out. Settings over those of the recipe",
        ),
    ],
    protocol: Annotated[
        Path | None,
        typer.Option("--protocol", "--recipe", help="Protocol file of the fine-tuned sets; else the recipe's"),
    ] = None,
    only: Annotated[str, typer.Option(help="Compute only this set (xnli) or pair ('xnli seed 1')")] = "",
    force: Annotated[bool, typer.Option("--force", help="Compute it again even if it is there")] = False,
) -> None:
    """Score masked language models and the recipe's teacher side by side.

    Held-out text, fill-mask, size, latency, and by a protocol fine-tuned sets; one table with intervals.
    """
    recipes, overrides, models = _sorted_words(words)
    if not models or len(recipes) > 1:
        raise typer.BadParameter("name at least one model, and at most one recipe", param_hint="MODEL...")
    if protocol:
        import json

        overrides.append(f"score.protocol={json.dumps(str(protocol.absolute()))}")
    loaded = _recipe(Path(recipes[0]) if recipes else DEMO, overrides)
    _flow(loaded, "flows.score", "score", loaded, models[0], tuple(models[1:]), only, force)


@app.command(epilog="Example:  distil up deployments/pilot.toml --port 4200 --mlflow-port 5000")
def up(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECIPE.toml ...]", help="Recipes to register; the bundled ones if left out"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of Prefect; without it 4200 if free, else any")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of MLflow; without it 5000 if free, else any")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder of all state, over that of the recipes; .distil if none says")
    ] = None,
) -> None:
    """Serve Prefect, MLflow and a worker with all deployments, for the browser, until Ctrl-C.

    Loopback only, so there is no --host; for more than one machine see docker/.
    """
    from flows.services.up import serve
    from tasks.recipe.load import load_recipe

    overrides = [f"home={home.absolute()}"] if home else []
    loaded = [load_recipe(path, overrides) for path in recipes or sorted(DEMO.parent.glob("*.toml"))]
    homes = sorted({recipe.home for recipe in loaded})
    if len(homes) > 1:
        raise DistilError(f"these recipes have different homes ({', '.join(homes)}); give one with --home")
    serve(loaded, homes[0], port, mlflow_port)


@app.command(epilog='Example:  distil promote deployments/pilot.toml --version 3 --force --reason "the set was mended"')
def promote(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="Registered model, to make sure; it must be the recipe's own")] = "",
    version: Annotated[str, typer.Option(help="Number of the version; the challenger if left out")] = "",
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate says; needs --reason")] = False,
    reason: Annotated[str, typer.Option(help="Why it is forced; kept with the version")] = "",
) -> None:
    """Make a version of the recipe's model champion if the gate lets it through. Refused: status 1, and the reasons."""
    loaded = _recipe(recipe, overrides)
    from flows.home import user

    _flow(loaded, "flows.promote", "promote", loaded, model, version, force, reason, user())


def _sorted_words(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Recipe files, settings and all others, each in their order."""
    overrides = [word for word in words if re.match(r"[\w.-]+=", word)]  # runs/lr=1e-3/model is a folder
    recipes = [word for word in words if word.endswith(".toml") and word not in overrides]
    return recipes, overrides, [word for word in words if word not in (*recipes, *overrides)]


def _run(recipe: "Recipe") -> None:
    from flows.home import open_store
    from flows.pipeline.finished import all_done, show_done

    store = open_store(recipe)
    done = all_done(store, recipe)
    if done:
        show_done(store, recipe, done)
        print(done.sentence)
        return
    _flow(recipe, "flows.distill", "distill", recipe)


def _recipe(path: Path, overrides: Sequence[str] | None) -> "Recipe":
    """The recipe, and the environment that Prefect, MLflow and transformers look at when they are imported."""
    from flows.home import TYPED_COMMAND, set_environment
    from flows.services.servers import join_up
    from tasks.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or ())
    set_environment(recipe.home)
    os.environ[TYPED_COMMAND] = shlex.join([os.path.relpath(path) if path == DEMO else str(path), *(overrides or ())])
    if not os.environ.get("PREFECT_API_URL"):
        join_up(recipe.home)  # also for what asks MLflow without a flow, as a warm start does
    return recipe


def _flow(recipe: "Recipe", module: str, name: str, *arguments: Any) -> None:
    """Runs a flow here, against the server of PREFECT_API_URL or one of our own; its sentence is ours."""
    from flows.services.servers import start_server

    wait = start_server(recipe.home)
    flow = getattr(import_module(module), name)  # takes seconds, while the server starts
    wait()
    state = flow(*arguments, return_state=True)
    if state.is_completed():
        print(state.message or "done")
        return
    cause = state.result(raise_on_failure=False)
    if isinstance(cause, Exception):
        raise cause  # a fault of the program keeps its traceback
    raise DistilError(state.message or f"the run ended {state.name}")


def main() -> None:
    """Entry point: a user's mistake is one sentence and status 1, never a traceback."""
    try:
        app()
    except DistilError as error:
        print(f"distil: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
