#!/usr/bin/env bash
# Pre-train and freeze the bundled base (about an hour on 2 cores). Resumable: run it again after any interruption.
# TINY=1 runs every stage in seconds into build/base-tiny and leaves the package alone (what CI does).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
if [ "${TINY:-0}" = 1 ]; then
  work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
  set -- --work "$work" --out "$work/frozen" --vocab 512 --hidden 32 --layers 1 --heads 2 --intermediate 64 \
    --steps 4 --batch 2 --warmup 2 --eval-every 2 --eval-windows 2 --save-every 2 --max-docs 12 --ngram-tokens 2000 --task-windows 1 --no-compile "$@"
fi
exec "$PYTHON" runs/pretrain_base.py "$@"
