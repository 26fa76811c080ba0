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
script=schedule.sh
. build/gcloud.sh

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
own_data=$data data=${data:-$model_uri/data}
trigger=$service-refresh source=$model_uri/source.tgz
account=$service-build@$project.iam.gserviceaccount.com caller=$service-schedule@$project.iam.gserviceaccount.com

if [ -z "$own_data" ]; then
  there storage ls "$data/labels.json" || act storage cp --no-clobber training/data/*.json training/data/*.jsonl "$data/"
elif [[ "$data" != "$model_uri"/* ]]; then
  [[ "$data" =~ ^gs://([^/]+)/(.+)$ ]] || fail "--data: expected gs://bucket/prefix, found $data; mend it"
  act storage buckets add-iam-policy-binding "gs://${BASH_REMATCH[1]}" --member "serviceAccount:$account" \
    --role roles/storage.objectViewer --condition None
fi

substitutions="_MODEL_URI=$model_uri,_DATA=$data,_SERVICE_ACCOUNT=$account${set_:+,$set_}"
if [ -n "$repo" ]; then
  origin=(--build-config cloudbuild.yaml --repository "$repo" --branch "$branch")
else
  archive=$(mktemp -d)/source.tgz
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  tar -czf "$archive" --exclude __pycache__ .gcloudignore \
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

# Who starts a build is not who runs it: the caller may start builds and nothing else.
make_account "$service-schedule" "$service: starts the scheduled build"
grant_project "$caller" roles/cloudbuild.builds.editor
verb=create
there scheduler jobs describe "$trigger" --location "$region" && verb=update
act scheduler jobs "$verb" http "$trigger" --location "$region" --schedule "$schedule" --time-zone "$time_zone" \
  --uri "https://cloudbuild.googleapis.com/v1/projects/$project/locations/$region/triggers/$trigger:run" \
  --http-method POST --oauth-service-account-email "$caller" --message-body '{}'
[ -z "$run_now" ] || act builds triggers run "$trigger" --region "$region"
[ -n "$dry_run" ] || echo "scheduled: $schedule ($time_zone); new texts go to $data; see it with
  python -m build.status --model-uri $model_uri --project $project --region $region"
