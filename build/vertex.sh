#!/usr/bin/env bash
# The training steps on Vertex AI instead of here: the workspace goes to the bucket, a custom job runs the very same
# steps of cloudbuild.yaml on it, what they made comes back. A job sees the bucket as files under /gcs
# (https://cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system).
#
# `build/deploy.sh --vertex` gives the build's service account the rights for it.
set -euo pipefail

place=${_MODEL_URI%/}/training/$BUILD_ID
mounted=/gcs/${place#gs://}
declare -px | grep '^declare -x _[A-Z]' > .local/build/parameters.sh
packed=$(mktemp -d)/in.tgz
tar -czf "$packed" --exclude __pycache__ build function training tests/requirements.txt main.py requirements.txt \
  Makefile pyproject.toml cloudbuild.yaml .local/build
gcloud storage cp "$packed" "$place/in.tgz"

command="set -e; cd \"\$(mktemp -d)\"; tar -xzf $mounted/in.tgz; . .local/build/parameters.sh; export _TRAIN_ON=build
make install; .venv/bin/python -m build.local steps finetune,distill
cd .local/build; tar -czf $mounted/out.tgz \$(ls -d teacher student 2> /dev/null)"
job=$(gcloud ai custom-jobs create --region "$LOCATION" --project "$PROJECT_ID" --display-name "needs-$BUILD_ID" \
  --service-account "$_SERVICE_ACCOUNT" --command bash --args "^~^-c~$command" \
  --worker-pool-spec "replica-count=1,container-image-uri=python:3.12,$_VERTEX_MACHINE" --format 'value(name)')
echo "training: $job"

while true; do
  state=$(gcloud ai custom-jobs describe "$job" --region "$LOCATION" --project "$PROJECT_ID" --format 'value(state)')
  case "$state" in
    JOB_STATE_SUCCEEDED) break ;;
    JOB_STATE_FAILED | JOB_STATE_CANCELLED | JOB_STATE_EXPIRED)
      echo "vertex: expected $job to succeed, found $state; its log says why" >&2
      exit 1
      ;;
  esac
  sleep "$_VERTEX_POLL_SECONDS"
done
gcloud storage cat "$place/out.tgz" | tar -xz -C .local/build
gcloud storage rm "$place/in.tgz" "$place/out.tgz"
