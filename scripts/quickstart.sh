#!/usr/bin/env bash
# Everything from nothing: makes a virtual environment, trains a small GPT-MoE on 4 processes, kills it, resumes it and
# shows that the losses are the same bit for bit. Python 3.10+ is all it needs: no GPU, no compiler.
#
#   scripts/quickstart.sh             run it
#   scripts/quickstart.sh --help      what else it can do
set -euo pipefail
# shellcheck source=scripts/_env.sh
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/_env.sh"
moc_environment
exec "$PYTHON" "$MOC_ROOT/scripts/quickstart.py" "$@"
