#!/usr/bin/env bash
# Print the JobSet that trains on a TPU slice of a GKE cluster: launch/gke_jobset.yaml, filled in. It creates nothing.
#
#   docker build --file=launch/Dockerfile --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/lowrank . && docker push ...
#   NAME=alpaca TYPE=v5litepod-16 IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/lowrank launch/gke_jobset.sh \
#     --config=configs/alpaca.py --workdir=gs://BUCKET/runs/alpaca --config.base=gs://BUCKET/llama2-7b \
#     --config.data.train=gs://BUCKET/alpaca.json > runs/alpaca.yaml
#   kubectl apply -f runs/alpaca.yaml
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=alpaca      # watch
#   kubectl delete jobset alpaca                                  # stop: SIGTERM, which saves. Applied again, it resumes
#   gcloud storage rsync --recursive gs://BUCKET/runs/alpaca runs/alpaca
#
# Needs: bash and python3 here; what the template's header says there. All arguments go to `python -m lowrank.train`, and
# what they name must be in buckets or in the image. What it costs is said on stderr:
#
#   TYPE, NAME, PRICE_PER_CHIP_HOUR as in tpu_vm.sh     TOPOLOGY  of v5p and v4, such as 2x2x2     SPOT=true  or false
#   RESTARTS=20     MAX_HOURS=12  after which it fails, counted anew after a restart
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/tpu.sh
source launch/tpu.sh

: "${IMAGE:?say IMAGE=..., built from launch/Dockerfile and pushed where the cluster can pull it}"
read_type
read_arguments "$@"
[[ $workdir == gs://* ]] || die "pods take their disks with them: say --workdir=gs://BUCKET/FOLDER"
case $TYPE in
  v5litepod-1 | v6e-1) topology=1x1 ;;
  v5litepod-4 | v6e-4) topology=2x2 ;;
  v5litepod-8 | v6e-8) topology=2x4 ;;
  v5litepod-16 | v6e-16) topology=4x4 ;;
  v5litepod-32 | v6e-32) topology=4x8 ;;
  v5litepod-64 | v6e-64) topology=8x8 ;;
  v5litepod-128 | v6e-128) topology=8x16 ;;
  v5litepod-256 | v6e-256) topology=16x16 ;;
  *) topology=${TOPOLOGY:?say TOPOLOGY=..., the shape of $TYPE in chips, such as 2x2x2} ;;
esac
((${topology//x/*} == chips)) || die "TOPOLOGY=$topology is not the shape of $TYPE, which has $chips chips"

say_cost
echo "with RESTARTS=${RESTARTS:=20} that is the most for each of the $((RESTARTS + 1)) starts" >&2
# substitute() refuses a name that is not there. JSON is YAML, so arguments are quoted as JSON.
exec env NAME="$NAME" IMAGE="$IMAGE" RESTARTS="$RESTARTS" HOSTS="$hosts" CHIPS_PER_HOST="$((chips / hosts))" \
  ACCELERATOR="$accelerator" TOPOLOGY="$topology" SPOT="${SPOT:-true}" \
  MAX_SECONDS="$(LC_ALL=C awk -v hours="$MAX_HOURS" 'BEGIN { printf "%d", 3600 * hours }')" \
  python3 -c '
import json, os, string, sys
lines = [line for line in open("launch/gke_jobset.yaml") if not line.startswith("#")]
if os.environ["SPOT"] == "false":
    lines = [line for line in lines if "cloud.google.com/gke-spot: " not in line]
print(string.Template("".join(lines)).substitute(os.environ, ARGUMENTS=json.dumps(sys.argv[1:])), end="")
' "$@"
