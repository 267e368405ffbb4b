#!/usr/bin/env bash
# Train on a TPU VM or a slice of several: create it, copy this checkout there, install, run on all hosts, fetch, delete.
#
#   ZONE=us-west4-a TYPE=v5litepod-8 launch/tpu_vm.sh --config=configs/alpaca.py --workdir=runs/alpaca \
#     --config.base=gs://BUCKET/llama2-7b --config.data.train=gs://BUCKET/alpaca.json
#
# Needs: gcloud, logged in, with a project that has quota for TYPE in ZONE; bash, git, tar. A slice of several hosts needs
# --workdir=gs://BUCKET/FOLDER, which its service account can write, and gcloud's key in an ssh-agent (it reaches all hosts at
# once): ssh-add ~/.ssh/google_compute_engine. All arguments go to `python -m lowrank.train`.
#
#   TYPE  v5litepod-8 (default), v5litepod-16, v6e-8, v5p-8 ...     NAME, RUNTIME, EXTRAS  where the defaults do not suit
#   PRICE_PER_CHIP_HOUR  what a chip costs, in dollars (default: see launch/tpu.sh)
#   MAX_HOURS=12  then it is stopped, saved, fetched and deleted      YES=1  do not ask      KEEP=1  do not delete
#   TO=runs/FOLDER  where a gs:// workdir is fetched to
#
# Ctrl-C stops the training there, which saves; then fetches and deletes. The same command again resumes. The exit code is
# the training's: 0 done, 75 stopped and saved, 134 process 0 is lost, 1 a mistake. What is on the machine's own disk is gone with it: if the
# result is worth more than a fetch that may fail, use gs://. Try the arguments with --dry_run on this machine first.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/tpu.sh
source launch/tpu.sh

: "${ZONE:?say ZONE=..., the zone to create it in}"
read_type
read_arguments "$@"
[[ $hosts == 1 || $workdir == gs://* ]] ||
  die "TYPE=$TYPE is $hosts hosts, which must all see the workdir: say --workdir=gs://BUCKET/FOLDER"
confirm

alive() { true; } # nobody takes it away
describe_command=(gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" "--format=value(state)")
delete_command=(gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet)
guard

created=1
step gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$runtime" --quiet
step install
code=0
train "$@" || code=$?
fetch_and_exit "$code"
