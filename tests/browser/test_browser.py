"""The daily work in the browser: trigger a run from its form, read its page, retry a failed run, retry one shard."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow.tracking import MlflowClient

from tests.browser.conftest import ARGUMENTS, CHROMIUM, PATIENCE, TRUNCATED_RECIPE, Site
from tests.harness.project import TRUNCATED, new_artifacts

if TYPE_CHECKING:
    from playwright.sync_api import Page

playwright = pytest.importorskip("playwright.sync_api")
shown = playwright.expect

pytestmark = [pytest.mark.slow, pytest.mark.browser]

MILLISECONDS = 1000 * PATIENCE
STEPS = 30


@pytest.fixture
def page(site: Site) -> Iterator["Page"]:
    """A page of a fresh browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(MILLISECONDS)
        shown.set_options(timeout=MILLISECONDS)
        yield page
        browser.close()


def open_form(page: "Page", site: Site, flow: str, recipe: str) -> None:
    """From the front page to the form of deployment FLOW/RECIPE, by clicks."""
    page.goto(site.up.prefect)
    page.get_by_role("link", name="Deployments").click()
    page.get_by_placeholder("Search deployments").fill(recipe)
    page.wait_for_url(lambda url: recipe in url)  # the page waits before it searches, and would take us back here
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=flow, exact=True))
    row.get_by_role("link", name=recipe, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()


def submit(page: "Page") -> None:
    """Sends the form off and opens the page of the run that it made; its own link to it is gone after seconds."""
    for _ in range(5):  # a busy database answers 503, and a person presses again
        with page.expect_response(lambda answer: answer.url.endswith("/create_flow_run")) as made:
            page.get_by_role("button", name="Submit").click()
        if made.value.ok:
            break
    assert made.value.ok, made.value.text()
    page.goto(f"{page.url.split('/v2/')[0]}/v2/runs/flow-run/{made.value.json()['id']}")


def wait_for_state(page: "Page", state: str) -> None:
    """Watches the page of a run until it says so."""
    shown(page.get_by_role("main").get_by_text(state, exact=True).first).to_be_visible()


def take_screenshot(page: "Page", path: Path) -> None:
    """A screenshot of the page of a run, reloaded."""
    page.reload()
    shown(page.get_by_role("tab", name="Artifacts")).to_be_visible()
    page.wait_for_timeout(3000)  # its graph is drawn on a canvas, which says nothing of when it is done
    page.screenshot(path=path)


def open_artifact(page: "Page", key: str) -> None:
    """From the page of a run to the newest of its artifacts of this name."""
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name=key).first.click()
    page.get_by_role("main").locator("a[href*='/artifacts/artifact/']").first.click()


def test_a_run_is_triggered_from_its_form_and_found_in_mlflow(page: "Page", site: Site, screens: Path) -> None:
    open_form(page, site, "distill", "tiny")
    page.get_by_label("Max Steps (Optional)").fill(str(STEPS))
    page.get_by_label("Mlm (Optional)").fill("0.4")
    page.screenshot(path=screens / "form.png")
    submit(page)
    wait_for_state(page, "Completed")
    take_screenshot(page, screens / "run.png")
    open_artifact(page, "mlflow-run")
    page.get_by_role("main").get_by_role("link", name="MLflow run", exact=True).click()
    check_mlflow(page, site, screens)


def check_mlflow(page: "Page", site: Site, screens: Path) -> None:
    """The MLflow run: the two fields as they were set, its tags and model version, and the curves of its training."""
    (run,) = MlflowClient(site.up.mlflow).search_runs(["1"], "tags.`distil.part` = 'chain' and params.name = 'tiny'")
    assert run.info.run_id in page.url
    assert (run.data.params["train.max_steps"], run.data.params["loss.mlm"]) == (str(STEPS), "0.4")
    for text in ("train.max_steps", "distil.prefect_run_id"):
        shown(page.get_by_text(text, exact=True).first).to_be_visible()
    shown(page.locator("a[href$='#/models/distilled/versions/1']").first).to_be_visible()
    page.screenshot(path=screens / "mlflow-run.png")
    page.get_by_role("link", name="tiny train").click()
    page.get_by_text("Model metrics", exact=True).click()
    search = page.get_by_role("searchbox", name="Search metric charts")
    for curve in ("cosine", "distil", "mlm", "loss"):  # only what is in sight is drawn
        search.fill(curve)
        shown(page.get_by_role("heading", name=curve, exact=True)).to_be_visible()
        shown(page.get_by_text(f"tiny train ({curve})", exact=True)).to_be_visible()
    search.fill("")
    shown(page.get_by_text("tiny train (cosine)", exact=True)).to_be_visible()
    page.screenshot(path=screens / "mlflow-curves.png")


def test_the_retry_button_completes_a_failed_run(page: "Page", site: Site, screens: Path) -> None:
    open_form(page, site, "distill", TRUNCATED_RECIPE)
    submit(page)
    wait_for_state(page, "Failed")
    run = page.url
    take_screenshot(page, screens / "failed-run.png")
    open_artifact(page, "failures")
    shown(page.get_by_role("cell", name=TRUNCATED, exact=True)).to_be_visible()
    page.screenshot(path=screens / "failures.png")
    before = site.project.creation_times()
    site.truncated_file.write_bytes(site.complete_source)
    page.goto(run)
    page.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Retry").click()
    page.get_by_role("dialog").or_(page.get_by_role("alertdialog")).get_by_role("button", name="Retry").click()
    wait_for_state(page, "Completed")
    fresh = new_artifacts(before, site.project.creation_times(), "source", "shard", "blocks", "targets")
    assert {label.rsplit("-", 1)[0] for _, label in fresh} == {"fr_meta_part_2"}
    assert {kind for kind, _ in fresh} == {"source", "shard", "blocks", "targets"}


def test_one_shard_is_retried_from_its_form(page: "Page", site: Site) -> None:
    """Two are lost, one is named."""
    # Of a source that both recipes have; part 2 is packed in one of them.
    wanted, other = [one for one in site.project.receipts("targets") if one.label.startswith("fr_meta_part_1")][:2]
    for lost in (wanted, other):
        site.project.store.withdraw(lost.ref)
    before = site.project.creation_times()
    open_form(page, site, "retry-shard", "tiny")
    page.get_by_label("shard (Optional)").fill(wanted.label)
    submit(page)
    wait_for_state(page, "Completed")
    assert new_artifacts(before, site.project.creation_times()) == {("targets", wanted.label)}
