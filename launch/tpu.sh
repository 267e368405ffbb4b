# shellcheck shell=bash
# What tpu_vm.sh, queued_resource.sh and gke_jobset.sh share: sourced by them, never run.
#
# One idea, the cost guard: nothing is created before its price is said and agreed to, and whatever was created is deleted
# when the script ends, however it ends: done, failed, Ctrl-C, MAX_HOURS over. What it cannot do: delete anything once
# this machine is off or the script is killed with SIGKILL. So run it where it can stay, in tmux for instance.

: "${YES:=}" "${KEEP:=}" "${EXTRAS:=}" "${TO:=}" "${PAUSE:=30}" "${MAX_HOURS:=12}" "${NAME:=lowrank-$(date +%m%d-%H%M%S)}"
describe_command=() delete_command=() # the scripts say them
created='' stopping='' training='' interrupted='' watchdog=''

die() {
  echo "error: $*" >&2
  exit 1
}

# ---- What is asked for, and what it costs -----------------------------------------------------------------------------

# TYPE -> chips, hosts, price ($ per chip and hour), runtime (image of a TPU VM), accelerator (GKE's name of the chip).
# Prices: on demand, US regions, as in lowrank/planning/prices.py (v4: cloud.google.com/tpu/pricing), looked up on 2026-11-24;
# Spot costs less, and changes.
read_type() {
  [[ ${TYPE:=v5litepod-8} =~ ^(v5litepod|v6e|v5p|v4)-([1-9][0-9]*)$ ]] ||
    die "TYPE=$TYPE is unknown; say v5litepod-N or v6e-N (N chips), v5p-N or v4-N (N cores, two to a chip)"
  local kind=${BASH_REMATCH[1]} size=${BASH_REMATCH[2]} most
  # shellcheck disable=SC2034  # runtime and accelerator are for the scripts
  case $kind in # most: chips of the largest slice that is one host
    v5litepod) chips=$size most=8 price=1.20 runtime=v2-alpha-tpuv5-lite accelerator=tpu-v5-lite-podslice ;;
    v6e) chips=$size most=8 price=2.70 runtime=v2-alpha-tpuv6e accelerator=tpu-v6e-slice ;;
    v5p) chips=$((size / 2)) most=4 price=4.20 runtime=v2-alpha-tpuv5 accelerator=tpu-v5p-slice ;;
    v4) chips=$((size / 2)) most=4 price=3.22 runtime=tpu-ubuntu2204-base accelerator=tpu-v4-podslice ;;
  esac
  hosts=$((chips <= most ? 1 : chips / 4))
  price=${PRICE_PER_CHIP_HOUR:-$price} runtime=${RUNTIME:-$runtime}
  [[ $price =~ ^[0-9]*\.?[0-9]+$ ]] || die "PRICE_PER_CHIP_HOUR=$price is no number"
  [[ $MAX_HOURS =~ ^[0-9]*\.?[0-9]+$ ]] || die "MAX_HOURS=$MAX_HOURS is no number"
}

say_cost() {
  LC_ALL=C awk -v type="$TYPE" -v chips="$chips" -v hosts="$hosts" -v price="$price" -v hours="$MAX_HOURS" 'BEGIN {
    printf "%s, %d chips (hosts: %d) at $%.2f an hour each (PRICE_PER_CHIP_HOUR, assumed): ", type, chips, hosts, price
    printf "$%.2f an hour, at most $%.2f in MAX_HOURS=%g\n", chips * price, chips * price * hours, hours }' >&2
}

confirm() {
  say_cost
  [ "$YES" = 1 ] && return
  [ -t 0 ] || die "this costs money and there is no terminal to ask on; set YES=1 to agree"
  read -r -p "Create $NAME in $ZONE? [y/N] " answer
  [[ $answer == [yY]* ]] || die "nothing was created"
}

# The training's arguments -> workdir (there), TO (here).
read_arguments() {
  local argument
  workdir=''
  for argument in "$@"; do
    case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
  done
  [ -n "$workdir" ] || die "--workdir=DIR is missing among the arguments: gs://BUCKET/FOLDER, or a folder in the checkout"
  workdir=${workdir%/}
  case $workdir in
    gs://*) ;;
    /* | *..*) die "--workdir=$workdir must be gs://BUCKET/FOLDER or a folder in the checkout, such as runs/alpaca" ;;
  esac
  case $workdir in
    gs://*) TO=${TO:-runs/$(basename "$workdir")} ;;
    *) TO=$workdir ;; # so that the same command again takes it along, and resumes
  esac
  case "$*" in *gs://*) EXTRAS=${EXTRAS:-tpu,gcs} ;; *) EXTRAS=${EXTRAS:-tpu} ;; esac
}

# ---- The guard --------------------------------------------------------------------------------------------------------

# Before anything is created. The script has said how: describe_command and delete_command, arrays of words.
guard() {
  local said
  if said=$("${describe_command[@]}" 2>&1); then
    die "$NAME is there already, and this script deletes what it uses; choose another NAME, or delete it: ${delete_command[*]}"
  fi
  [[ $said == *NOT_FOUND* ]] || die "cannot ask for $NAME: $said"
  trap 'end $?' EXIT
  trap 'stop SIGINT' INT
  trap 'stop SIGTERM' TERM
  trap 'stop SIGHUP' HUP
  trap 'stop "MAX_HOURS=$MAX_HOURS over"' USR1
  local deadline
  deadline=$(LC_ALL=C awk -v now="$(date +%s)" -v hours="$MAX_HOURS" 'BEGIN { printf "%d", now + 3600 * hours }')
  # By the clock and not by one long sleep, which stands still while a laptop does. Then ten minutes to save.
  (
    until [ "$(date +%s)" -ge "$deadline" ]; do sleep 1 && kill -0 $$ || exit; done
    kill -USR1 $$ && sleep 600 && kill -USR1 $$
  ) > /dev/null 2>&1 < /dev/null &
  watchdog=$!
}

# Runs one command to its end. In a process group of its own, so that Ctrl-C reaches this script only; and bash acts on
# signals during `wait`, but not during a command.
step() {
  set -m
  "$@" < /dev/null &
  local child=$! code
  set +m
  while :; do
    code=0 interrupted=''
    wait "$child" || code=$?
    [ -n "$interrupted" ] || break # else it was a signal that ended the `wait`, and not the command
  done
  return "$code"
}

# The first signal stops the training, which saves; the second, or one before or after it, ends the script (and deletes).
# No `return` in here: from a trap it gives the status of the `wait` that was interrupted, which `set -e` takes for a failure.
stop() {
  interrupted=1
  if [ -n "$training" ] && [ -z "$stopping" ]; then
    stopping=1
    echo "$1: asking the training to save and stop; once more ends without waiting for it" >&2 || true
    # shellcheck disable=SC2016  # expanded there
    (trap '' INT && remote all 'kill -TERM "$(cat lowrank/launch.pid)"' < /dev/null) ||
      echo "warning: the training could not be told" >&2
  else
    echo "$1: ending" >&2 || true
    end_step
    exit 75
  fi
}

# Not with one signal: a child that has just begun may lose it, before it has put away the traps of this shell.
end_step() {
  local job attempt
  for job in $(jobs -p); do
    [ "$job" != "$watchdog" ] || continue
    for ((attempt = 0; attempt < 100; attempt++)); do
      kill -TERM -- "-$job" 2> /dev/null || continue 2
      sleep 0.1
    done
    kill -KILL -- "-$job" 2> /dev/null || true
  done
}

end() {
  local code=$1
  trap - EXIT
  trap '' INT TERM HUP USR1 # deleting is not interrupted
  [ -z "$watchdog" ] || kill "$watchdog" 2> /dev/null || true
  if [ -n "$created" ] && [ "$KEEP" = 1 ]; then
    echo "KEEP=1: $NAME is still there and costs money until you say: ${delete_command[*]}" >&2
  elif [ -n "$created" ]; then
    delete || code=$((code == 0 ? 1 : code))
  fi
  exit "$code"
}

delete() {
  local attempt said
  for attempt in 1 2 3; do
    if "${delete_command[@]}" < /dev/null; then
      created=''
      echo "deleted $NAME" >&2
      return
    fi
    if ! said=$("${describe_command[@]}" 2>&1) && [[ $said == *NOT_FOUND* ]]; then
      created='' # it was never made, or is gone
      return
    fi
    [ "$attempt" = 3 ] || sleep "$PAUSE"
  done
  cat >&2 << END
**********************************************************************************************************************
$NAME COULD NOT BE DELETED AND COSTS MONEY EVERY HOUR. Delete it yourself, now:
  ${delete_command[*]}
**********************************************************************************************************************
END
  return 1
}

# ---- On the machines --------------------------------------------------------------------------------------------------

remote() { # WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2" --quiet
}

# The checkout (what git tracks, as it is now; and the workdir, if it is a folder here) on every host, installed.
# TPU VM images have Python 3.10; lowrank needs 3.11, which uv brings.
install() {
  local archive attempt
  archive=$(mktemp -d)
  {
    git ls-files -z
    case $workdir in gs://*) ;; *) [ ! -d "$workdir" ] || printf '%s\0' "$workdir" ;; esac
  } | tar --null --files-from=- --create --gzip --file="$archive/lowrank.tgz" || return
  for attempt in 1 2 3 4 5; do # a machine that has just started does not know the key yet
    gcloud compute tpus tpu-vm scp "$archive/lowrank.tgz" "$NAME:" --zone="$ZONE" --worker=all --quiet && break
    [ "$attempt" != 5 ] || return 1
    sleep "$PAUSE"
  done
  rm -r "$archive"
  remote all "set -e
    mkdir -p lowrank
    tar -xzf lowrank.tgz -C lowrank
    python=python3
    if ! python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; then
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv python install 3.12
      python=\$(~/.local/bin/uv python find 3.12)
    fi
    cd lowrank
    make .venv/.installed PYTHON=\"\$python\" EXTRAS=$EXTRAS"
}

# The same command on every host; the code is the training's. It runs on when the connection breaks, and is found again.
# `alive` is the script's own: whether the machines are still there.
train() {
  local arguments code attempt lines=+1
  arguments=$(printf '%q ' "$@")
  step remote all "cd lowrank && rm -f launch.pid launch.exit && {
    nohup sh -c '.venv/bin/python -m lowrank.train \"\$@\" & echo \$! > launch.pid; wait \$!; echo \$? > launch.exit' \
      lowrank $arguments > launch.log 2>&1 < /dev/null &
    until [ -s launch.pid ]; do sleep 0.1; done
  }" || return
  training=1
  for attempt in 1 2 3 4 5; do
    code=0
    step remote all "cd lowrank && tail -n $lines --pid=\$(cat launch.pid) -f launch.log
      for second in 1 2 3 4 5; do [ -s launch.exit ] || sleep 1; done
      exit \$(cat launch.exit)" || code=$?
    [ "$code" = 255 ] && [ "$attempt" != 5 ] || break
    echo "the connection broke; trying again in $PAUSE s" >&2
    step sleep "$PAUSE" || true
    alive || break
    lines=20
  done
  training=''
  return "$code"
}

# The workdir, as far as it got -> TO, here.
fetch() {
  case $workdir in
    gs://*) mkdir -p "$TO" && gcloud storage rsync --recursive "$workdir" "$TO" ;;
    *)
      mkdir -p "$(dirname "$TO")" &&
        remote 0 "tar -czf workdir.tgz -C lowrank $(printf %q "$workdir")" &&
        gcloud compute tpus tpu-vm scp "$NAME:workdir.tgz" "$TO.tgz" --zone="$ZONE" --worker=0 --quiet &&
        tar -xzf "$TO.tgz" && rm "$TO.tgz"
      ;;
  esac
}

# Ends the script with the training's code, after fetching what there is.
fetch_and_exit() { # CODE
  if step fetch; then
    echo "fetched $workdir to $TO" >&2
  elif [ "$1" = 0 ]; then
    echo "error: the training is done, but $workdir could not be fetched to $TO" >&2
    exit 1
  else
    echo "warning: nothing was fetched from $workdir" >&2
  fi
  exit "$1"
}
