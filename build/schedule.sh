#!/usr/bin/env bash
# A refresh on a schedule: a manual build trigger, and a Scheduler job that starts it. May be run again.
#
#   build/schedule.sh --project my-project --data gs://my-project-needs/needs/data
#   build/schedule.sh --project my-project --repo projects/…     the source comes from a connected repository
#
# Without a repository the trigger's first step fetches the source's archive, which this script puts into the bucket.
# New data gets in by lying at --data when the build runs: add a file of labelled texts there, or replace one.
# Where nothing is new since the release that is served, the build ends at once and well.
set -euo pipefail
cd "$(dirname "$0")/.."

project="" region=asia-northeast3 service=needs model_uri="" data="" schedule="0 4 * * 1" time_zone=Asia/Seoul
repo="" branch=main set_="" dry_run="" run_now=""

usage() {
  cat <<TEXT
build/schedule.sh --project PROJECT [options]
  --region REGION          ($region)
  --service NAME           as it was deployed ($service)
  --model-uri URI          gs://bucket/prefix of the releases (gs://PROJECT-needs/needs)
  --data URI               gs://bucket/prefix of the texts (MODEL_URI/data, begun with training/data)
  --schedule CRON          ($schedule)
  --time-zone ZONE         ($time_zone)
  --repo NAME              projects/…/connections/…/repositories/…; without one the source lies in the bucket
  --branch NAME            of the repository ($branch)
  --set _NAME=VALUE,...    more of the pipeline's parameters
  --run-now                start the first build at once
  --dry-run                print what would be done
TEXT
}

fail() {
  echo "schedule.sh: $1" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1; shift; continue ;;
    --run-now) run_now=1; shift; continue ;;
    --help) usage; exit 0 ;;
  esac
  [ $# -gt 1 ] || fail "$1: expected a value after it, found none; see --help"
  case "$1" in
    --project) project=$2 ;;
    --region) region=$2 ;;
    --service) service=$2 ;;
    --model-uri) model_uri=${2%/} ;;
    --data) data=${2%/} ;;
    --schedule) schedule=$2 ;;
    --time-zone) time_zone=$2 ;;
    --repo) repo=$2 ;;
    --branch) branch=$2 ;;
    --set) set_=$2 ;;
    *) fail "$1: expected one of the options of --help, found an unknown one; mend it" ;;
  esac
  shift 2
done
[ -n "$project" ] || fail "--project: expected the project's id, found none; name it"
model_uri=${model_uri:-gs://$project-needs/needs}
data=${data:-$model_uri/data}
trigger=$service-refresh source=$model_uri/source.tgz
account=$service-build@$project.iam.gserviceaccount.com

there() { gcloud "$@" --project "$project" > /dev/null 2>&1; }
act() {
  printf '+ gcloud'
  printf ' %q' "$@"
  echo
  [ -n "$dry_run" ] || gcloud "$@" --project "$project" --quiet
}

there storage ls "$data/labels.json" || act storage cp training/data/*.json training/data/*.jsonl "$data/"

substitutions="_MODEL_URI=$model_uri,_DATA=$data,_SERVICE_ACCOUNT=$account${set_:+,$set_}"
if [ -n "$repo" ]; then
  origin=(--build-config cloudbuild.yaml --repository "$repo" --branch "$branch")
else
  archive=$(mktemp -d)/source.tgz
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  tar -czf "$archive" --exclude __pycache__ \
    build function training tests/requirements.txt main.py requirements.txt Makefile pyproject.toml cloudbuild.yaml
  act storage cp "$archive" "$source"
  origin=(--inline-config cloudbuild.yaml)
  substitutions+=",_SOURCE=$source"
fi
if there builds triggers describe "$trigger" --region "$region"; then
  act builds triggers delete "$trigger" --region "$region"
fi
act builds triggers create manual --name "$trigger" --region "$region" "${origin[@]}" \
  --service-account "projects/$project/serviceAccounts/$account" --substitutions "$substitutions"

act projects add-iam-policy-binding "$project" --member "serviceAccount:$account" \
  --role roles/cloudbuild.builds.editor --condition None
verb=create
there scheduler jobs describe "$trigger" --location "$region" && verb=update
act scheduler jobs "$verb" http "$trigger" --location "$region" --schedule "$schedule" --time-zone "$time_zone" \
  --uri "https://cloudbuild.googleapis.com/v1/projects/$project/locations/$region/triggers/$trigger:run" \
  --http-method POST --oauth-service-account-email "$account" --message-body '{}'
[ -z "$run_now" ] || act builds triggers run "$trigger" --region "$region"
[ -n "$dry_run" ] || echo "scheduled: $schedule ($time_zone); new texts go to $data; see it with
  python -m build.status --model-uri $model_uri --project $project --region $region"
