#!/usr/bin/env bash
# Tests and benchmarks on one GPU; see README.md beside this file. PYTHON names the interpreter, python3 if unset.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"

# The repository root is the package, whatever its folder is called: a link with the package's name makes it importable
# without installing it, which would ask for packages that such a machine lacks.
link="$(mktemp -d)"
trap 'rm -rf "$link"' EXIT
ln -s "$root" "$link/kvshard"
export PYTHONPATH="$link:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
"${PYTHON:-python3}" "$here/run.py" "$@"
