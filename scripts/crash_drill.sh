#!/usr/bin/env bash
# Kills a training run on purpose and watches it come back, so that the first crash is not the real one. On one node.
#
#   scripts/crash_drill.sh runs/drill/checkpoints -- scripts/launch/gpt_125m_8e.sh
#   scripts/crash_drill.sh --help
set -euo pipefail
exec "${PYTHON:-python3}" "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/crash_drill.py" "$@"
