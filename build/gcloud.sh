# shellcheck shell=bash
# Sourced by deploy.sh and schedule.sh: how they ask and act. `project`, `dry_run` and `script` are theirs.
fail() {
  echo "${script:?}: $1" >&2
  exit 2
}
# Asks: a command that changes nothing, whose failure says that something is not there.
there() { gcloud "$@" --project "${project:?}" > /dev/null 2>&1; }
# Acts: a command that changes something; only printed in a dry run.
act() {
  printf '+ gcloud'
  printf ' %q' "$@"
  echo
  [ -n "${dry_run:-}" ] || gcloud "$@" --project "$project" --quiet
}
# A new account or right takes up to two minutes until all of Google Cloud knows it.
act_until_known() {
  for _ in 1 2 3 4 5 6 7 8; do
    act "$@" && return
    sleep "${RETRY_SECONDS:-15}"
  done
  act "$@"
}
make_account() { # name, what it is for
  there iam service-accounts describe "$1@$project.iam.gserviceaccount.com" \
    || act iam service-accounts create "$1" --display-name "$2"
}
grant_project() { # account, role
  act_until_known projects add-iam-policy-binding "$project" --member "serviceAccount:$1" --role "$2" --condition None
}
