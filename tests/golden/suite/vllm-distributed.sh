#!/bin/bash -l
#SBATCH --job-name=vllm-distributed-suite
#SBATCH --output=vllm-distributed-suite_%j.out
#SBATCH --error=vllm-distributed-suite_%j.err
#SBATCH --time=01:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --exclusive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --gres=gpu:2
#SBATCH hetjob
#SBATCH --time=01:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --exclusive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH hetjob
#SBATCH --time=01:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --exclusive
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
module load Apptainer

set -euo pipefail
umask 077
OUT="$PWD"/experiments/vllm-distributed-suite-"${SLURM_JOB_ID}"
mkdir -p "$OUT/logs" "$OUT/results" "$OUT/monitoring"
NAME=vllm-distributed-suite
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.out" "$OUT/logs/slurm_job.log"
ln -sf "$PWD/${NAME}_${SLURM_JOB_ID}.err" "$OUT/logs/slurm_job.err"
export OUTPUT_DIR="$OUT" HERDER_EXECUTOR_TOKEN_FILE="$OUT/executor.token"
HERDER=herder
SERVER_PORT=8000
CLIENT_PORT=6000
cat > "$OUT/recipe.json" <<'HERDER_RECIPE'
{"scenario": "vllm-distributed-suite", "partition": "gpu", "account": "my-project", "modules": ["Apptainer"], "orchestration": {"mode": "slurm", "total_nodes": 5, "node_allocation": {"servers": {"nodes": 2}, "clients": {"nodes": 2}}, "job_config": {"time_limit": "01:00:00", "exclusive": true}}, "resources": {"servers": {"gpus": 2, "cpus_per_task": 8, "mem_gb": 64}, "clients": {"gpus": 0, "cpus_per_task": 4, "mem_gb": 16}}, "workload": {"component": "inference", "service": "vllm", "model": "facebook/opt-1.3b", "clients_per_node": 10, "duration": "5m", "warmup": "30s"}, "servers": {"health_check": {"timeout": 900, "interval": 5, "endpoint": "/health"}, "service_config": {"distributed": {"enabled": true, "backend": "ray", "tensor_parallel_size": 4, "pipeline_parallel_size": 1, "ray": {"dashboard_port": 8265, "object_manager_port": 8076, "node_manager_port": 8077, "num_cpus_per_node": 8, "num_gpus_per_node": 2}}, "max_model_len": 2048, "gpu_memory_utilization": 0.7, "enforce_eager": true}}, "artifacts": {"containers_dir": "/project/containers", "service": {"path": "vllm.sif", "remote": "docker://vllm/vllm-openai:latest"}}, "binds": ["/project/huggingface:/huggingface:rw"], "environment": {"HF_HOME": "/huggingface"}}
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
if [ ! -e /project/containers/vllm.sif ]; then
  apptainer pull /project/containers/vllm.sif."$SLURM_JOB_ID" docker://vllm/vllm-openai:latest
  mv /project/containers/vllm.sif."$SLURM_JOB_ID" /project/containers/vllm.sif
fi
printf '%s\n' HF_HOME=/huggingface > "$OUT/environment"
ENVIRONMENT=(bash -c 'set -a; . "$0"; set +a; exec "$@"' "$OUT/environment")
SERVER=("${ENVIRONMENT[@]}" apptainer exec --nv --bind /project/huggingface:/huggingface:rw /project/containers/vllm.sif python3 -m vllm.entrypoints.openai.api_server --model=facebook/opt-1.3b --host=0.0.0.0 --port=8000 --tensor-parallel-size=4 --distributed-executor-backend=ray --max-model-len=2048 --gpu-memory-utilization=0.7 --enforce-eager)
HERDER_RUN=("$HERDER")
EXECUTOR=(executor --service vllm --port 6000 --host 0.0.0.0)

export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
HEAD=${SERVERS[0]}
HEAD_IP=$(getent ahostsv4 "$(address "$HEAD")" | awk 'NR == 1 { print $1 }')
RAY_HEAD=("${ENVIRONMENT[@]}" apptainer exec --nv --bind /project/huggingface:/huggingface:rw /project/containers/vllm.sif ray start --disable-usage-stats --head --port=6379 --object-manager-port=8076 --node-manager-port=8077 --num-cpus=8 --num-gpus=2 --dashboard-port=8265 --block)
RAY_WORKER=("${ENVIRONMENT[@]}" apptainer exec --nv --bind /project/huggingface:/huggingface:rw /project/containers/vllm.sif ray start --disable-usage-stats --address=@HEAD@ --object-manager-port=8076 --node-manager-port=8077 --num-cpus=8 --num-gpus=2 --block)
RAY_PROBE=("${ENVIRONMENT[@]}" apptainer exec --nv --bind /project/huggingface:/huggingface:rw /project/containers/vllm.sif python3 -c 'import ray, sys; ray.init(address='"'"'auto'"'"', logging_level='"'"'error'"'"'); sys.exit(sum(node['"'"'Alive'"'"'] for node in ray.nodes()) < int(sys.argv[1]))')
step 0 "$HEAD" ray "${RAY_HEAD[@]}"
for node in "${SERVERS[@]:1}"; do
  step 0 "$node" ray "${RAY_WORKER[@]/@HEAD@/$HEAD_IP:6379}"
done
began=$SECONDS
until srun --het-group=0 --nodes=1 --ntasks=1 --nodelist="$HEAD" --overlap \
    "${RAY_PROBE[@]}" "${#SERVERS[@]}" > /dev/null 2>&1; do
  for step in "${STEPS[@]}"; do
    kill -0 "$step" 2>/dev/null || { echo "a node of Ray has ended: see $OUT/logs" >&2; exit 1; }
  done
  if [ $((SECONDS - began)) -gt 900 ]; then echo "Ray's nodes did not get together in 900 s" >&2; exit 1; fi
done
ENDPOINTS=("$(address "$HEAD")")
step 0 "$HEAD" container "${SERVER[@]}"
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
