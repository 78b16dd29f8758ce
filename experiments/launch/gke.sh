#!/usr/bin/env bash
# Fills in gke_jobset.yaml and applies it. Not run on a TPU by us. Needs envsubst (gettext), kubectl, and JobSet in the
# cluster.
#
#   experiments/launch/gke.sh [--dry-run] -- SCRIPT ...   e.g. experiments/pipeline.py --config=configs/demo.py
#
# Adds --workdir=/mnt/br_jax/RUN, and --multihost where the slice has several hosts. --dry-run prints the manifest.
# Settings, from the environment: those of gke_jobset.yaml, of which MAX_RESTARTS has a default (10), and RUN, which
# defaults to NAME. To go on with a run whose JobSet has ended: kubectl delete jobset NAME, then the same command.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

check() {
  local setting
  : "${MAX_RESTARTS:=10}" "${RUN:=${NAME:-}}"
  for setting in NAME IMAGE ACCELERATOR TOPOLOGY CHIPS_PER_HOST CLAIM MAX_RESTARTS RUN; do
    [[ -n ${!setting:-} ]] || fail "$setting is not set: see the head of gke_jobset.yaml"
    [[ ${!setting} =~ ^[A-Za-z0-9._/:@-]+$ ]] || fail "$setting ${!setting}: only letters, digits and . _ / : @ -"
  done
  [[ $TOPOLOGY =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "TOPOLOGY $TOPOLOGY: not like 2x4 or 2x2x1"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS $MAX_RESTARTS: not a number"
  [[ $CHIPS_PER_HOST =~ ^[148]$ ]] || fail "CHIPS_PER_HOST $CHIPS_PER_HOST: not 1, 4 or 8"
  local chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS_PER_HOST == 0)) || fail "TOPOLOGY $TOPOLOGY: $chips chips are not whole hosts of $CHIPS_PER_HOST"
  HOSTS=$((chips / CHIPS_PER_HOST))
}

main() {
  local dry_run=false manifest
  if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
  [[ ${1:-} == -- && $# -gt 1 ]] || fail "nothing to run: add -- and the script"
  shift
  check
  command -v envsubst >/dev/null || fail "envsubst is not installed: it comes with gettext"
  $dry_run || command -v kubectl >/dev/null || fail "kubectl is not installed: see kubernetes.io/docs/tasks/tools"
  set -- "$@" "--workdir=/mnt/br_jax/$RUN"
  if ((HOSTS > 1)); then set -- "$@" --multihost; fi
  COMMAND=$(printf ' %q' "$@")
  COMMAND=${COMMAND# }
  COMMAND=${COMMAND//"'"/"''"} # for YAML's single quotes
  export NAME IMAGE ACCELERATOR TOPOLOGY CHIPS_PER_HOST CLAIM MAX_RESTARTS HOSTS COMMAND
  manifest=$(envsubst <"$(dirname "$0")/gke_jobset.yaml")
  if $dry_run; then
    echo "$manifest"
  else
    kubectl apply --filename=- <<<"$manifest"
    echo "follow it: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME"
  fi
}

main "$@"
