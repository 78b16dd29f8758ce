#!/usr/bin/env bash
# What tpu_vm.sh has each worker of a TPU slice do, in the project's folder there.
#
#   worker.sh install MOUNT [SHARED]   Python, the pinned packages, and SHARED (gs://BUCKET or HOST:/PATH) on MOUNT
#   worker.sh start SCRIPT ...         starts a script with the project's Python; it outlives the connection
#   worker.sh follow | status | stop   the run's log until it ends; its exit status; SIGTERM to it
set -euo pipefail
cd "$(dirname "$0")/../.."

# The TPU VMs' own Python is 3.10 (Ubuntu 22.04), too old for the project, so uv brings one.
install() {
  [[ -x ~/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -d .venv ]] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
  ~/.local/bin/uv pip install --quiet --constraint requirements.lock --editable '.[tpu]'
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null # else JAX warns of a slow start
  mountpoint -q "$1" && return
  sudo mkdir -p "$1"
  sudo chown "$(id -u):$(id -g)" "$1"
  case ${2:-} in
    gs://*) mount_bucket "$1" "${2#gs://}" ;;
    ?*) mount_export "$1" "$2" ;;
  esac
}

# Every worker must see at once what another wrote, so what is known of files is not cached, here and in mount_export.
# Modes cannot be changed in a bucket: all files are the owner's alone, as the provider's folder must be.
mount_bucket() {
  command -v gcsfuse >/dev/null || install_gcsfuse
  gcsfuse --dir-mode=700 --file-mode=600 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$2" "$1"
}

# As https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_install gcsfuse
}

mount_export() {
  command -v mount.nfs >/dev/null || apt_install nfs-common
  sudo mount -t nfs -o actimeo=0,lookupcache=none "$2" "$1"
  sudo chown "$(id -u):$(id -g)" "$1"
}

# A fresh VM updates itself for some minutes: wait for its lock.
apt_install() {
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y "$1"
}

# The lock lives as long as the run, and keeps a second one out of its workdir.
start() {
  exec 9>run.lock
  flock --nonblock 9 || {
    echo "error: a run is under way on this worker: follow it with logs, or stop it" >&2
    exit 2
  }
  rm -f run.status
  (
    trap '' HUP
    status=0
    .venv/bin/python "$@" || status=$?
    echo "$status" >run.status
  ) >run.log 2>&1 </dev/null &
  echo $! >run.pid
}

follow() { tail --pid="$(cat run.pid)" --lines=+1 --follow run.log; }

status() { cat run.status; }

stop() { pkill -TERM --parent "$(cat run.pid)"; }

"$@"
