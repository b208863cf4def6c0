#!/usr/bin/env bash
# All checks and tests, in a virtual environment of its own. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
moc_environment

step() { printf '\n== %s\n' "$1"; }

step "ruff"
ruff check .
ruff format --check .
step "mypy"
mypy
step "import-linter"
lint-imports
step "docs are generated from the code"
python scripts/docs/configuration.py --check
python scripts/docs/pec_tables.py --check
python scripts/docs/patches.py --check
if [ "$#" -gt 0 ]; then
    step "pytest"
    exec python -m pytest "$@"
fi
status=0
step "pytest: unit tests, on up to four cores"
python -m pytest -n auto --maxprocesses 4 tests/unit || status=$?
step "pytest: tests that start processes, one after the other"
python -m pytest tests/distributed tests/faults tests/gpu tests/mds || status=$?
exit "$status"
