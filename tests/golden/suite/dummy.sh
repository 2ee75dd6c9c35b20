#!/bin/bash -l
#SBATCH --job-name=dummy-suite
#SBATCH --output=dummy-suite_%j.out
#SBATCH --error=dummy-suite_%j.err
#SBATCH --time=00:10:00
#SBATCH --partition=cpu
#SBATCH --account=my-project
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=1G
#SBATCH hetjob
#SBATCH --time=00:10:00
#SBATCH --partition=cpu
#SBATCH --account=my-project
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=1G
#SBATCH hetjob
#SBATCH --time=00:10:00
#SBATCH --partition=cpu
#SBATCH --account=my-project
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=1G

set -euo pipefail
umask 077
OUT="$PWD"/experiments/dummy-suite-"${SLURM_JOB_ID}"
mkdir -p "$OUT/logs" "$OUT/results" "$OUT/monitoring"
NAME=dummy-suite
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.out" "$OUT/logs/slurm_job.log"
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.err" "$OUT/logs/slurm_job.err"
export OUTPUT_DIR="$OUT" HERDER_EXECUTOR_TOKEN_FILE="$OUT/executor.token"
HERDER=herder
SERVER_PORT=8000
CLIENT_PORT=6000
cat > "$OUT/recipe.json" <<'HERDER_RECIPE'
{"scenario": "dummy-suite", "partition": "cpu", "account": "my-project", "modules": [], "orchestration": {"mode": "slurm", "total_nodes": 3, "node_allocation": {"servers": {"nodes": 1}, "clients": {"nodes": 1, "clients_per_node": 4}}, "job_config": {"time_limit": "00:10:00", "exclusive": false}}, "resources": {"servers": {"gpus": 0, "cpus_per_task": 1, "mem_gb": 1}, "clients": {"gpus": 0, "cpus_per_task": 1, "mem_gb": 1}, "monitors": {"cpus_per_task": 1, "mem_gb": 1}}, "workload": {"component": "inference", "service": "dummy", "model": "dummy", "api": "completions", "duration": "1m", "warmup": "30s", "prompt_len": 64, "gen_tokens": 32}, "reporting": {"formats": ["json", "csv", "html"]}}
HERDER_RECIPE
echo "results: $OUT"

STEPS=()
living() {
  for step in "${STEPS[@]}"; do if kill -0 "$step" 2>/dev/null; then return 0; fi; done
  return 1
}
end_steps() {
  local job
  for job in "${SLURM_JOB_ID_HET_GROUP_0:-}" "${SLURM_JOB_ID_HET_GROUP_1:-}" "${SLURM_JOB_ID_HET_GROUP_2:-}"; do
    if [ -n "$job" ]; then scancel --quiet --signal=TERM "$job" 2>/dev/null || true; fi
  done
}
ends() {
  local code=$? began=$SECONDS is_early=$((SECONDS < 10)) told
  trap - EXIT INT TERM
  # srun would kill at once; a signal through Slurm lets monitors and executors end with their files complete.
  end_steps
  # Steps that are just being launched do not get it: where the job has hardly begun, it is sent every second.
  while living && [ $((SECONDS - began)) -lt 15 ]; do
    told=$SECONDS; sleep 0.2
    if [ "$is_early" = 1 ] && [ "$SECONDS" -gt "$told" ]; then end_steps; fi
  done
  for step in "${STEPS[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
  for step in "${STEPS[@]}"; do wait "$step" 2>/dev/null || true; done
  exit "$code"
}
trap ends EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A node's name where it can be looked up, else the address that Slurm itself uses.
address() {
  if getent hosts "$1" > /dev/null; then echo "$1"; return; fi
  local found
  found=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  echo "${found:-$1}"
}
step() {
  # step GROUP NODE COMPONENT COMMAND...: in the background, its output where the log collector looks.
  local group=$1 node=$2 component=$3 place
  shift 3
  place=$(address "$node")
  srun --het-group="$group" --nodes=1 --ntasks=1 --nodelist="$node" --overlap --unbuffered \
    --output="$OUT/logs/${component}_${place}.log" --error="$OUT/logs/${component}_${place}.err" "$@" &
  STEPS+=($!)
}
mapfile -t SERVERS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
mapfile -t CLIENTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
SERVER=( "$HERDER" suite dummy-server --host=0.0.0.0 --port=8000)
HERDER_RUN=("$HERDER")
EXECUTOR=(executor --service dummy --port 6000 --host 0.0.0.0)

ENDPOINTS=()
for node in "${SERVERS[@]}"; do
  ENDPOINTS+=("$(address "$node")")
  step 0 "$node" container "${SERVER[@]}"
done
for node in "${SERVERS[@]}"; do
  step 0 "$node" monitor "${HERDER_RUN[@]}" monitor --quiet --interval 5s --metrics gpu,cpu,ram,disk,network --save "$OUT/monitoring/servers_$node.csv"
done
for node in "${CLIENTS[@]}"; do
  step 1 "$node" monitor "${HERDER_RUN[@]}" monitor --quiet --interval 5s --metrics cpu,ram,disk,network --save "$OUT/monitoring/clients_$node.csv"
done

PLACES=()
for node in "${CLIENTS[@]}"; do
  PLACES+=("$(address "$node")")
  step 1 "$node" client "${HERDER_RUN[@]}" "${EXECUTOR[@]}"
done

ORCHESTRATOR=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_2")
srun --het-group=2 --nodes=1 --ntasks=1 --nodelist="$ORCHESTRATOR" --overlap --unbuffered \
  --output="$OUT/logs/orchestrator_local.log" --error="$OUT/logs/orchestrator_local.err" \
  "${HERDER_RUN[@]}" orchestrate --server-nodes "${ENDPOINTS[@]}" --client-nodes "${PLACES[@]}" \
  --workload-config-file "$OUT/recipe.json" --server-port "$SERVER_PORT" --client-port "$CLIENT_PORT" \
  --timeout 600 &
MAIN=$!
STEPS+=("$MAIN")
while kill -0 "$MAIN" 2>/dev/null; do
  wait -n || true
  if kill -0 "$MAIN" 2>/dev/null; then
    for step in "${STEPS[@]}"; do
      if ! kill -0 "$step" 2>/dev/null; then
        echo "a step ended before the orchestrator: see $OUT/logs" >&2
        exit 1
      fi
    done
  fi
done
code=0
wait "$MAIN" || code=$?
exit "$code"
