#!/usr/bin/env bash
# From a fresh clone to the method at work: launchers/quickstart.sh [options of `bmtpt demo`]
# The first start makes .venv (see setup_env.sh), later ones go straight to the demo. Paths are seen from where you are.
set -euo pipefail
run="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/run.sh"
echo "quickstart: bmtpt demo $*" >&2
status=0
bash "$run" bmtpt demo "$@" || status=$?
activate="$(dirname "$(dirname "$run")")/.venv/bin/activate"
[ "$status" != 0 ] || printf 'For these commands in this shell: source %q\n' "$activate"
exit "$status"
