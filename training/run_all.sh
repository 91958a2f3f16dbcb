#!/usr/bin/env bash
# The mini checkpoint from nothing: toys, renders, VAE, UNet, evaluation. The same command continues an interrupted run.
#
#     bash training/run_all.sh            # days on a CPU; on a GPU the rendering is what takes longest
#     bash training/run_all.sh --smoke    # every step at its smallest, in minutes: nothing is learned
#
# OUT is the folder of everything it makes, out/recipe if not set.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/recipe}
mkdir -p "$out"

source training/launch.sh

if [ "${1:-}" = "--smoke" ]; then
    printf '%s\n' mug-1000 car-1000 house-1000 > "$out/train.txt"
    printf '%s\n' mug-0 > "$out/heldout.txt"
    train=(--names "$out/train.txt" --samples 1) heldout=(--names "$out/heldout.txt" --samples 1)
    vae=(--minutes 0.3 --gate 0)
    unet=(--steps 2 --batch-size $((2 * processes)) --micro-batch-size 2 --validation-steps 2)
    score=(--steps 4)
else
    train=(--toys 50) heldout=(--names evaluation/toys.txt)
    vae=(--minutes 120)
    unet=(--steps 40000 --micro-batch-size $((64 / processes)) --mixed-precision "$precision")
    score=()
fi

python -m training.render "${train[@]}" --output "$out/train"
python -m training.render "${heldout[@]}" --output "$out/heldout"
python -m evaluation.heldout --renders "$out/heldout" --train-data "$out/train" --output "$out/objects"
python -m training.train_vae --data "$out/train" --validation "$out/heldout" --output "$out/vae" "${vae[@]}"
[ -d "$out/mini" ] || python -m training.mini --vae "$out/vae" --output "$out/mini"
"${launch[@]}" -m training.train --phase scratch --in-memory --permute-colours --checkpoint "$out/mini" \
    --data "$out/train" --validation "$out/heldout" --output "$out/unet" "${unet[@]}"
checkpoint=$(ls -d "$out"/unet/checkpoint-* | sort -V | tail -1)
python -m evaluation.evaluate --checkpoint "$checkpoint" --heldout "$out/objects" --output "$out/evaluation" "${score[@]}"
echo "$checkpoint"
