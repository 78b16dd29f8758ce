#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU VM slice, of one host or many, through gcloud. Not run on a TPU by us.
#
#   experiments/launch/tpu_vm.sh [FLAGS] SUBCOMMAND [-- COMMAND...]
#
#   create             asks for the slice (a queued resource) and waits until it is there
#   install            the project and its pinned packages on every worker; mounts SHARED
#   run -- SCRIPT ...  starts an experiment script on every worker, follows worker 0, exits with the script's status;
#                      adds --workdir, and --multihost where the slice has several hosts
#   logs               follows a run that was started before, after a lost connection
#   stop               sends the run SIGTERM on every worker: it saves a checkpoint and ends with status 143
#   exec -- COMMAND    runs a command in the project's folder on every worker
#   fetch              copies the run's files to runs/RUN here, all but the provider's: a Buffer stays where it is
#   delete             deletes the slice and its disks
#   all -- SCRIPT ...  create, install, run, fetch, delete
#
# Flags:
#   --dry-run   print each command instead of running it
#   --spot      create: a slice that may be taken at any time
#   --yes       delete: do not ask
#   --cleanup   delete the slice when something fails
#
# Settings, from the environment:
#   NAME, PROJECT, ZONE   of the slice
#   ACCELERATOR_TYPE      e.g. v5litepod-8; docs/pods.md has a table
#   RUNTIME_VERSION       of the TPU VM's image; default: the one for JAX on that TPU
#   REPOSITORY, REF       what the workers clone, and the branch, tag or commit of it (default: main);
#                         without REPOSITORY this clone's last commit is copied
#   SHARED                what all workers mount, needed for several hosts: gs://BUCKET (with hierarchical namespace)
#                         or an NFS export HOST:/PATH
#   RUN                   name of the run, default NAME: its workdir is /mnt/br_jax/RUN
#
# A run that ended with 143, or whose spot slice was taken, goes on from its last checkpoint: give the same `run` again;
# after a slice was taken, first delete, create and install. Without SHARED its files are gone with the slice.
set -euo pipefail
exec 3>&1 # where --dry-run prints, also from within $( )

# fail MESSAGE [STATUS]
fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

((BASH_VERSINFO[0] >= 5)) || fail "bash $BASH_VERSION: this script needs bash 5 or newer"
root=$(cd "$(dirname "$0")/../.." && pwd)
readonly root mount=/mnt/br_jax worker=br_jax/experiments/launch/worker.sh
: "${REPOSITORY:=}" "${REF:=main}" "${SHARED:=}" "${RUN:=${NAME:-}}"
dry_run=false spot=false yes=false cleanup=false where=() multihost=()

# Words as one string that a shell reads back as the same words.
quoted() {
  local word separator="" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || word="'${word//"'"/"$escaped"}'"
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

call() {
  if $dry_run; then printf '%s\n' "$(quoted "$@")" >&3; else "$@"; fi
}

# on WORKER COMMAND: a shell command on worker 0, or on "all".
on() {
  call gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

copy() {
  call gcloud compute tpus tpu-vm scp "$1" "$2" "${where[@]}" --worker="$3"
}

# As https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case $ACCELERATOR_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local flags=() state=""
  $spot && flags+=(--spot)
  call gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="${RUNTIME_VERSION:-$(runtime_version)}" "${flags[@]}"
  while true; do
    state=$(call gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)')
    if $dry_run || [[ $state == ACTIVE ]]; then return; fi
    case $state in
      FAILED | SUSPENDING | SUSPENDED) fail "$NAME is $state: delete it, then create it again" 1 ;;
    esac
    echo "$NAME: $state" >&2
    sleep 30
  done
}

install() {
  local archive=$root/build/br_jax.tar.gz
  if [[ -n $REPOSITORY ]]; then
    on all "{ [ -d br_jax ] || git clone --quiet $(quoted "$REPOSITORY") br_jax; } && cd br_jax &&
git fetch --quiet origin $(quoted "$REF") && git checkout --quiet --detach FETCH_HEAD"
  else
    call mkdir -p "$root/build"
    call git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    copy "$archive" "$NAME:br_jax.tar.gz" all
    on all "mkdir -p br_jax && tar -xzf br_jax.tar.gz -C br_jax"
  fi
  on all "$(quoted "$worker" install "$mount" ${SHARED:+"$SHARED"})"
}

run() {
  on all "$(quoted "$worker" start "$@" --workdir="$mount/$RUN" "${multihost[@]}")"
  logs
}

logs() {
  local status
  on 0 "$worker follow" || true
  # Asked for by itself: whether gcloud hands on the status of what it ran is not documented.
  status=$(on 0 "$worker status") ||
    fail "no exit status yet: logs follows again; if the slice was taken, delete, create, install and run go on" 1
  case ${status:-0} in
    0) ;;
    143) fail "the run was stopped by SIGTERM and saved a checkpoint: the same run command goes on" 143 ;;
    *) fail "the run ended with status $status" "$status" ;;
  esac
}

stop() {
  on all "$worker stop"
}

fetch() {
  local folder=$root/runs/$RUN
  on 0 "tar --exclude=./provider --exclude=checkpoints -czf run.tar.gz -C $(quoted "$mount/$RUN") ."
  call mkdir -p "$folder"
  copy "$NAME:run.tar.gz" "$folder/run.tar.gz" 0
  call tar -xzf "$folder/run.tar.gz" -C "$folder"
  call rm "$folder/run.tar.gz"
}

delete() {
  local answer=y
  $yes || $dry_run || read -r -p "Delete $NAME in $ZONE and its disks? [y/N] " answer
  [[ $answer == [yY]* ]] || fail "$NAME is kept" 1
  call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

check() {
  local subcommand=$1 setting
  for setting in NAME PROJECT ZONE ACCELERATOR_TYPE; do
    [[ -n ${!setting:-} ]] || fail "$setting is not set: see the head of $0"
  done
  [[ $ACCELERATOR_TYPE =~ ^(v4|v5p|v5litepod|v6e)-[0-9]+$ ]] ||
    fail "ACCELERATOR_TYPE $ACCELERATOR_TYPE: not v4-N, v5p-N, v5litepod-N or v6e-N: see docs/pods.md"
  # Up to 8, which counts cores of v4 and v5p and chips of v5e and v6e, a slice is one host.
  if ((${ACCELERATOR_TYPE##*-} > 8)); then
    multihost=(--multihost)
    [[ -n $SHARED ]] || fail "SHARED is not set: the hosts of $ACCELERATOR_TYPE need one workdir"
  fi
  case $subcommand in
    run | exec | all) (($# > 1)) || fail "$subcommand: nothing to run: add -- and the command" ;;
  esac
  case $subcommand in
    delete | all) $yes || $dry_run || [[ -t 0 ]] || fail "$subcommand: no terminal to ask on: add --yes" ;;
  esac
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed: cloud.google.com/sdk/docs/install"
  where=(--project="$PROJECT" --zone="$ZONE")
}

main() {
  local subcommand=""
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      --dry-run) dry_run=true ;;
      --spot) spot=true ;;
      --yes) yes=true ;;
      --cleanup) cleanup=true ;;
      create | install | run | logs | stop | exec | fetch | delete | all) subcommand=$1 ;;
      *) fail "$1: no such flag or subcommand: see the head of $0" ;;
    esac
    shift
  done
  shift $(($# > 0)) # the --
  [[ -n $subcommand ]] || fail "no subcommand: create, install, run, logs, stop, exec, fetch, delete or all"
  check "$subcommand" "$@"
  if $cleanup; then trap '(($? == 0)) || { yes=true && delete; }' EXIT; fi
  case $subcommand in
    exec) on all "cd br_jax && $(quoted "$@")" ;;
    all) # a line each: errexit is off inside a && b
      create
      install
      run "$@"
      fetch
      delete
      ;;
    *) "$subcommand" "$@" ;;
  esac
}

main "$@"
