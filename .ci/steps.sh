# What .ci/run and .ci/nightly share: a copy of the checkout, the machine's packages, and steps that print their seconds.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# step NAME COMMAND ARGUMENTS: runs one step in the copy; a failure is recorded and the next step runs.
step() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@" || failed+=("$name")
  printf '== %s: %s s (%s s in total)\n' "$name" "$((SECONDS - start))" "$SECONDS"
}

# Ends the script: status 1 and the names of the failed steps if any step failed.
finish() {
  if [ ${#failed[@]} -gt 0 ]; then printf '\n== FAILED: %s\n' "${failed[*]}"; exit 1; fi
  printf '\n== passed in %s s\n' "$SECONDS"
}

# As root on Debian: Chromium, PostgreSQL and sqlite3, for the tests that use them. Elsewhere those tests skip with a reason.
machine_packages() {
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "not installed here"; return; fi
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium postgresql sqlite3) \
    >apt.log 2>&1 || { tail -n 3 apt.log; echo "not installed: tests that need them will skip"; }
}

install_and_demo() { python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/distil demo; }
install_tests() { .venv/bin/pip install -q -e '.[test]'; }
default_suite() { install_tests && .venv/bin/pytest -n 2 --durations=10; }
lint_types_contracts() {
  .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports
}
pytest_run() { .venv/bin/pytest -n 2 --durations=10 "$@"; }

# The README's commands run in a copy, so that a developer's own .venv and .distil stay as they are.
git ls-files -z | xargs -0 cp --parents -t "$work"
if [ -d ../shared/data ]; then export DISTIL_TEST_DATA="${DISTIL_TEST_DATA:-$(cd ../shared/data && pwd)}"; fi
cd "$work"
