#!/usr/bin/env bash
# Train on Spot TPUs, for a fraction of the price: wait for them in the queue, run, and when they are taken away ask for
# others and resume.
#
#   ZONE=us-west4-a TYPE=v5litepod-16 launch/queued_resource.sh --config=configs/alpaca.py \
#     --workdir=gs://BUCKET/runs/alpaca --config.base=gs://BUCKET/llama2-7b --config.data.train=gs://BUCKET/alpaca.json
#
# Needs: what tpu_vm.sh needs, with quota for preemptible chips, and a workdir in a bucket, because the machines' own disks
# go with them. A run comes back to its last checkpoint: choose --config.checkpoint.every by what you can afford to lose.
# TYPE, NAME, RUNTIME, EXTRAS, TO, PRICE_PER_CHIP_HOUR, YES, KEEP as in tpu_vm.sh; and
#
#   RESTARTS=20  how often to ask again      MAX_HOURS=12  of all together, waiting included
#
# The price said is the one on demand, which Spot stays below. Asks again after exit code 75 (stopped and saved) or 134 (JAX
# aborted a process that lost process 0), a lost connection, or a state other than ACTIVE; ends with the training's code
# after 0 and after any other, because a mistake would only be repeated. Ctrl-C stops the training, which saves; then fetches and deletes.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/tpu.sh
source launch/tpu.sh

: "${ZONE:?say ZONE=..., the zone to create it in}"
: "${RESTARTS:=20}"
read_type
read_arguments "$@"
[[ $workdir == gs://* ]] || die "Spot machines take their disks with them: say --workdir=gs://BUCKET/FOLDER"
confirm

state() {
  "${describe_command[@]}" || echo UNKNOWN
}

wait_for_machines() {
  local now before=''
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || echo "$NAME: $now" >&2
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$PAUSE"
  done
}

alive() { [ "$(state)" = ACTIVE ]; }
describe_command=(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" "--format=value(state.state)")
delete_command=(gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet)
guard

attempt() {
  step wait_for_machines && step install && train "$@"
}

for ((restart = 0; ; restart++)); do
  created=1
  step gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$runtime" --spot --quiet
  code=0
  attempt "$@" || code=$?
  [ "$code" != 0 ] && [ -z "$stopping" ] || fetch_and_exit "$code"
  if [[ $code != 75 && $code != 134 && $code != 255 ]]; then
    # Where one host is taken away, the others fail with errors of their own, before the state says why.
    step sleep "$PAUSE"
    ! alive || fetch_and_exit "$code"
  fi
  [ "$restart" -lt "$RESTARTS" ] || {
    echo "error: given up after $RESTARTS restarts; the same command again resumes" >&2
    fetch_and_exit "$code"
  }
  echo "the machines are gone or stopped (code $code); asking for others, restart $((restart + 1)) of $RESTARTS" >&2
  delete || exit 1
  step sleep "$PAUSE"
done
