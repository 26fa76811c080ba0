#!/usr/bin/env bash
# From nothing to a working, private function: services, bucket, two service accounts with the least rights, deploy.
#
#   build/deploy.sh --project my-project
#   build/deploy.sh --project my-project --dry-run     prints the commands that would change something
#
# Everything may be run again: what is there is left as it is, or brought up to date. `gcloud run deploy --function`
# is used, not `gcloud functions deploy`, because the start-up probe and CPU boost are flags of that one only.
set -euo pipefail
cd "$(dirname "$0")/.."
script=deploy.sh
. build/gcloud.sh

project="" region=asia-northeast3 service=needs model_uri="" release=current
memory=512Mi cpu=1 concurrency=4 threads=8 min_instances=0 max_instances=10 refresh_seconds=300 max_calls=1000
max_body_bytes=10485760 bigquery=needs.score settings="" dry_run="" function_only="" build_may_deploy="" vertex=""

usage() {
  cat <<TEXT
build/deploy.sh --project PROJECT [options]
  --region REGION            ($region)
  --service NAME             of the function ($service)
  --model-uri URI            gs://bucket/prefix of the releases (gs://PROJECT-needs/needs)
  --release RELEASE          serve this one and no other ($release)
  --memory SIZE              ($memory) at least 384Mi: two releases during a refresh
  --cpu N                    vCPUs of an instance ($cpu)
  --concurrency N            requests of an instance at a time ($concurrency); --threads must exceed it
  --threads N                of gunicorn ($threads)
  --min-instances N          ($min_instances) 1 spares the first caller the cold start, at the price of an idle instance
  --max-instances N          ($max_instances)
  --refresh-seconds S        how often a new release is looked for ($refresh_seconds)
  --max-calls N              rows of a BigQuery call ($max_calls)
  --max-body-bytes N         of a request ($max_body_bytes); a BigQuery call has all its rows in one
  --bigquery DATASET.NAME    of the remote function in the SQL that is printed ($bigquery)
  --set NAME=VALUE,...       more settings of the function
  --build-may-deploy         give the build the rights that its parameter _DEPLOY needs
  --vertex                   give the build the rights, and the project the service, that _TRAIN_ON=vertex needs
  --function-only            deploy the function alone: services, bucket and accounts are there
  --dry-run                  print what would be done
TEXT
}

while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1; shift; continue ;;
    --function-only) function_only=1; shift; continue ;;
    --build-may-deploy) build_may_deploy=1; shift; continue ;;
    --vertex) vertex=1; shift; continue ;;
    --help) usage; exit 0 ;;
  esac
  [ $# -gt 1 ] || fail "$1: expected a value after it, found none; see --help"
  case "$1" in
    --project) project=$2 ;;
    --region) region=$2 ;;
    --service) service=$2 ;;
    --model-uri) model_uri=${2%/} ;;
    --release) release=$2 ;;
    --memory) memory=$2 ;;
    --cpu) cpu=$2 ;;
    --concurrency) concurrency=$2 ;;
    --threads) threads=$2 ;;
    --min-instances) min_instances=$2 ;;
    --max-instances) max_instances=$2 ;;
    --refresh-seconds) refresh_seconds=$2 ;;
    --max-calls) max_calls=$2 ;;
    --max-body-bytes) max_body_bytes=$2 ;;
    --bigquery) bigquery=$2 ;;
    --set) settings=$2 ;;
    *) fail "$1: expected one of the options of --help, found an unknown one; mend it" ;;
  esac
  shift 2
done
[ -n "$project" ] || fail "--project: expected the project's id, found none; name it"
model_uri=${model_uri:-gs://$project-needs/needs}
[[ "$model_uri" =~ ^gs://([^/]+)/(.+)$ ]] || fail "--model-uri: expected gs://bucket/prefix, found $model_uri; mend it"
bucket=${BASH_REMATCH[1]} prefix=${BASH_REMATCH[2]}
[[ "$cpu" =~ ^[1-9][0-9]*$ ]] || fail "--cpu: expected a whole number of at least 1, found $cpu; mend it"
queue=$((concurrency > cpu ? concurrency - cpu : 1))
[ "$threads" -gt $((cpu + queue)) ] || fail "--threads: expected more than $((cpu + queue)), which run or wait, found $threads"

account() { echo "$service-$1@$project.iam.gserviceaccount.com"; }

grant_prefix() { # account, role on this prefix alone
  act_until_known storage buckets add-iam-policy-binding "gs://$bucket" --member "serviceAccount:$(account "$1")" \
    --role "$2" --condition \
    "^~^expression=resource.name.startsWith(\"projects/_/buckets/$bucket/objects/$prefix/\")~title=$service-$1"
}
grant_use() { # account, of account
  act_until_known iam service-accounts add-iam-policy-binding "$(account "$2")" \
    --member "serviceAccount:$(account "$1")" --role roles/iam.serviceAccountUser
}

if [ -z "$function_only" ]; then
  act services enable run.googleapis.com cloudfunctions.googleapis.com cloudbuild.googleapis.com \
    artifactregistry.googleapis.com storage.googleapis.com iam.googleapis.com cloudscheduler.googleapis.com

  there storage buckets describe "gs://$bucket" \
    || act storage buckets create "gs://$bucket" --location "$region" \
      --uniform-bucket-level-access --public-access-prevention
  act storage buckets update "gs://$bucket" --versioning --uniform-bucket-level-access --public-access-prevention

  make_account "$service-run" "$service: the function, reads its releases"
  make_account "$service-build" "$service: the build, writes releases"
  grant_prefix run roles/storage.objectViewer
  grant_prefix build roles/storage.objectUser
  # who may not list is told 403, not 404, of what is not there; a condition on a prefix does not hold for that question
  act_until_known storage buckets add-iam-policy-binding "gs://$bucket" \
    --member "serviceAccount:$(account build)" --role roles/storage.legacyBucketReader --condition None
  grant_project "$(account build)" roles/logging.logWriter
  grant_project "$(account build)" roles/run.builder
  if [ -n "$build_may_deploy" ]; then
    grant_project "$(account build)" roles/run.sourceDeveloper
    grant_project "$(account build)" roles/serviceusage.serviceUsageConsumer
    grant_use build run
    grant_use build build
  fi
  if [ -n "$vertex" ]; then
    act services enable aiplatform.googleapis.com
    grant_project "$(account build)" roles/aiplatform.user
    grant_use build build
  fi
fi

# The start-up probe loads the release, so that no caller waits for it; before the first one there is nothing to load.
probe=/ready
[ "$release" != current ] || there storage objects describe "$model_uri/current.json" || probe=/health
environment="MODEL_URI=$model_uri,RELEASE=$release,REFRESH_SECONDS=$refresh_seconds,MAX_CALLS=$max_calls,MAX_BODY_BYTES=$max_body_bytes"
environment+=",THREADS=$threads,INFERENCE_THREADS=1,MAX_CONCURRENT=$cpu,MAX_QUEUE=$queue"
environment+=",GOOGLE_CLOUD_PROJECT=$project,ORT_DISABLE_TELEMETRY=1${settings:+,$settings}"
act run deploy "$service" --function needs --base-image python312 --source . --region "$region" \
  --no-allow-unauthenticated --memory "$memory" --cpu "$cpu" --concurrency "$concurrency" --cpu-boost \
  --startup-probe "httpGet.path=$probe,initialDelaySeconds=0,periodSeconds=1,timeoutSeconds=1,failureThreshold=60" \
  --min-instances "$min_instances" --max-instances "$max_instances" --timeout 60 \
  --service-account "$(account run)" \
  --build-service-account "projects/$project/serviceAccounts/$(account build)" --set-env-vars "$environment"
[ -z "$dry_run" ] || exit 0

[ "$probe" = /ready ] || echo "
No release is there yet: start a build (gcloud builds submit --ignore-file=.gcloudignore-build --region $region), then run
this once more, so that the start-up probe loads the release."
address=$(gcloud run services describe "$service" --region "$region" --project "$project" --format 'value(status.url)')
cat <<TEXT

The function: $address (private: a caller needs the role roles/run.invoker)

  curl $address -H "Authorization: Bearer \$(gcloud auth print-identity-token)" \\
    -H 'Content-Type: application/json' -d '{"text": "사람들에게 인정받고 싶어."}'

Its page in a browser, at http://localhost:8080:

  gcloud run services proxy $service --region $region --project $project --port 8080

Millions of rows, from BigQuery (its connection's service account needs roles/run.invoker, too):

  CREATE FUNCTION \`$project.$bigquery\`(text STRING) RETURNS JSON
    REMOTE WITH CONNECTION \`$project.$region.$service\`
    OPTIONS (endpoint = '$address', max_batching_rows = $max_calls);
TEXT
