#!/usr/bin/env bash
# The distributed tests of saving and restoring on the oldest DeepSpeed that is supported, in a virtual environment of
# its own. Arguments go to pytest. MOC_OLDEST picks another version. Where that version fails in its own code, tests are
# skipped with the reason. (test_oracle.py compares with the files of the version that CI runs.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
oldest="${MOC_OLDEST:-0.17.0}"
export MOC_VENV="${MOC_VENV:-$PWD/.venv-deepspeed-$oldest}"
# shellcheck source=scripts/_env.sh
source scripts/_env.sh
moc_environment
if [ "$("$PYTHON" -c 'from importlib.metadata import version; print(version("deepspeed"))')" != "$oldest" ]; then
    DS_BUILD_OPS=0 moc_pip "deepspeed $oldest" --no-build-isolation --no-deps "deepspeed==$oldest"
fi
exec "$PYTHON" -m pytest -rs tests/distributed/test_{exactness,resize,timelines,surgery,attempts,generators,token_counts,pec}.py "$@"
