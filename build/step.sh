# shellcheck shell=bash
# Sourced by the pipeline's steps: stop at the first failure; do nothing where `build.fresh` found nothing new.
set -eu
if [ -e .local/build/nothing-new ]; then
  echo "skipped: nothing new"
  exit 0
fi
