#!/usr/bin/env bash
# Train on another machine that ssh reaches (a TPU VM, a GPU box): copy this checkout there, install, run.
#
#   EXTRAS=tpu launch/ssh.sh USER@HOST --config=configs/alpaca.py --workdir=runs/alpaca --config.base=DIR_THERE ...
#
# EXTRAS is tpu, cuda12 or cuda13 (empty: CPU). Everything after the host goes to `python -m lowrank.train` as it is.
# The same command again resumes; Ctrl-C here does not stop the run there: it goes on in the background, its output in
# HOST:lowrank/launch.log, which this script follows.
set -euo pipefail
host=${1:?say USER@HOST first}
shift
cd "$(dirname "$0")/.."

git ls-files -z | tar --null --files-from=- --create --gzip | ssh "$host" 'mkdir -p lowrank && tar -xzf - -C lowrank'
# shellcheck disable=SC2029  # the arguments are this machine's
ssh "$host" "cd lowrank && make .venv/.installed EXTRAS=${EXTRAS:-} && : > launch.log && {
  nohup .venv/bin/python -m lowrank.train $(printf '%q ' "$@") > launch.log 2>&1 < /dev/null & pid=\$!
  tail -n +1 --pid=\$pid -f launch.log
  wait \$pid
}"
