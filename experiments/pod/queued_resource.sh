#!/usr/bin/env bash
# A training run on Cloud TPU VMs, v5e-16, through a queued resource: created, set up, started, and what to type after.
# topology: v5e:4x4
#
#   PROJECT=… ZONE=… BUCKET=… experiments/pod/queued_resource.sh
#
# Several slices: SLICES=N, and dcn=N in --mesh. A spot slice that is taken away is queued again under a new name; the
# same command goes on from the last checkpoint in the bucket.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
name="${NAME:-albert-base}"
slices="${SLICES:-1}"
if [ "$slices" -gt 1 ]; then
    nodes=(--node-count="$slices" --node-prefix="$name")
    mesh="dcn=$slices,data=16"
    workers=("$name-0")
else
    nodes=(--node-id="$name")
    mesh="data=16"
    workers=("$name")
fi
for ((i = 1; i < slices; i++)); do
    workers+=("$name-$i")
done
at=(--project="$PROJECT" --zone="$ZONE")

gcloud compute tpus queued-resources create "$name-queue" "${at[@]}" "${nodes[@]}" \
    --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot
until [ "$(gcloud compute tpus queued-resources describe "$name-queue" "${at[@]}" --format='value(state.state)')" = ACTIVE ]; do
    sleep 30
done

everywhere() { # one command on every host of every slice, at once
    for worker in "${workers[@]}"; do
        gcloud compute tpus tpu-vm ssh "$worker" "${at[@]}" --worker=all --command="$1" &
    done
    wait
}

for worker in "${workers[@]}"; do
    gcloud compute tpus tpu-vm scp --recurse . "$worker:flaxcompress" "${at[@]}" --worker=all
done
everywhere "python3 -m venv venv && venv/bin/pip install -q './flaxcompress[train]' 'jax[tpu]' gcsfs datasets"
everywhere "cd flaxcompress && ../venv/bin/flaxcompress train experiments/pod/albert_base.yaml out=gs://$BUCKET/$name --mesh $mesh"
