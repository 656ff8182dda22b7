#!/usr/bin/env bash
# Keeps vmherd's three processes running in the foreground. `./start.sh -h` explains every option.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
make --silent --directory "$root" setup >&2
exec "$root/.venv/bin/vmherd" up "$@"
