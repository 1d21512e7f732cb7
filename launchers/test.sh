#!/usr/bin/env bash
# Runs the tests in an environment of their own: launchers/test.sh [pytest arguments], paths seen from the repository's
# root. The first start makes .venv (see setup_env.sh), later ones go straight to pytest. Three files at a time: most
# tests use one core, and a third of their time they wait for jobs to start, to meet and to end.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/.."
exec bash "$here/run.sh" python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
