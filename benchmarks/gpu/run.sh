#!/usr/bin/env bash
# Tests and benchmarks on one GPU; see README.md beside this file. PYTHON names the interpreter, python3 if unset.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/run.py" "$@"
