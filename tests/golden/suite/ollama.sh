#!/bin/bash -l
#SBATCH --job-name=ollama-suite
#SBATCH --output=ollama-suite_%j.out
#SBATCH --error=ollama-suite_%j.err
#SBATCH --time=02:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --qos=default
#SBATCH --exclusive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --gres=gpu:1
#SBATCH hetjob
#SBATCH --time=02:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --qos=default
#SBATCH --exclusive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH hetjob
#SBATCH --time=02:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --qos=default
#SBATCH --exclusive
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
module load Apptainer

set -euo pipefail
umask 077
OUT="$PWD"/experiments/ollama-suite-"${SLURM_JOB_ID}"
mkdir -p "$OUT/logs" "$OUT/results" "$OUT/monitoring"
NAME=ollama-suite
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.out" "$OUT/logs/slurm_job.log"
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.err" "$OUT/logs/slurm_job.err"
export OUTPUT_DIR="$OUT" HERDER_EXECUTOR_TOKEN_FILE="$OUT/executor.token"
HERDER=herder
SERVER_PORT=11434
CLIENT_PORT=6000
cat > "$OUT/recipe.json" <<'HERDER_RECIPE'
{"scenario": "ollama-suite", "partition": "gpu", "account": "my-project", "qos": "default", "modules": ["Apptainer"], "orchestration": {"mode": "slurm", "total_nodes": 5, "node_allocation": {"servers": {"nodes": 2}, "clients": {"nodes": 2, "clients_per_node": 10, "distribution_strategy": "round-robin"}, "monitors": {"nodes": 1}}, "job_config": {"time_limit": "02:00:00", "exclusive": true}}, "resources": {"servers": {"gpus": 1, "cpus_per_task": 8, "mem_gb": 32}, "clients": {"gpus": 0, "cpus_per_task": 4, "mem_gb": 8}}, "workload": {"component": "inference", "service": "ollama", "model": "llama3.2", "duration": "2m", "warmup": "1m", "prompt_len": 128, "gen_tokens": 128, "benchmark_suite": [{"name": "latency_c1", "num_threads": 1, "sleep_seconds": 0.05}, {"name": "throughput_c10", "num_threads": 10}, {"name": "open_poisson", "target_rps": 4, "request_distribution": "poisson"}]}, "servers": {"health_check": {"enabled": true, "timeout": 300, "interval": 5, "endpoint": "/api/tags"}}, "environment": {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_MODELS": "/ollama/models"}, "artifacts": {"containers_dir": "/project/containers", "service": {"path": "ollama.sif", "remote": "docker://ollama/ollama:latest"}}, "binds": ["/project/ollama:/ollama:rw"], "reporting": {"formats": ["json", "csv", "html"], "include": ["metrics_summary", "performance_graphs", "resource_utilization"]}, "metadata": {"seed": 1, "tags": ["ollama"]}}
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
if [ ! -e /project/containers/ollama.sif ]; then
  apptainer pull /project/containers/ollama.sif."$SLURM_JOB_ID" docker://ollama/ollama:latest
  mv /project/containers/ollama.sif."$SLURM_JOB_ID" /project/containers/ollama.sif
fi
printf '%s\n' OLLAMA_NUM_PARALLEL=4 OLLAMA_MODELS=/ollama/models > "$OUT/environment"
ENVIRONMENT=(bash -c 'set -a; . "$0"; set +a; exec "$@"' "$OUT/environment")
SERVER=("${ENVIRONMENT[@]}" apptainer exec --nv --bind /project/ollama:/ollama:rw /project/containers/ollama.sif env OLLAMA_HOST=0.0.0.0:11434 ollama serve)
HERDER_RUN=("$HERDER")
EXECUTOR=(executor --service ollama --port 6000 --host 0.0.0.0)

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
