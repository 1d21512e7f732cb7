#!/usr/bin/env bash
# Runs the tests in an environment of their own: launchers/test.sh [pytest arguments], paths seen from the repository's
# root. The first start makes .venv (see setup_env.sh), later ones go straight to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env test,plot,triton </dev/null
cd "$root"
exec python -m pytest "$@"
