#!/usr/bin/env bash
# Runs the tests in an environment of their own: launchers/test.sh [pytest arguments], paths seen from the repository's
# root. The first start makes .venv (see setup_env.sh), later ones go straight to pytest. Two files at a time: most tests
# use one core, and the jobs of two ranks wait for each other half of their time.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/.."
exec bash "$here/run.sh" python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
