#!/usr/bin/env bash
# The mini checkpoint from nothing: toys and objects, renders, VAE, UNet, its LoRAs, evaluation. The same command continues
# an interrupted run.
#
#     OBJECTS="furniture/usr/share/sweethome3d/furniture/*.sh3f" bash lab/recipe.sh    # days on a CPU
#     bash lab/recipe.sh --smoke    # every step at its smallest, in minutes: nothing is learned
#
# OBJECTS are models to train on beside the toys, none if not set (lab/README.md says where to get them), and OUT is the
# folder of everything it makes, out/recipe if not set.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/recipe}
mkdir -p "$out"

# On a CPU a process of one thread for each core is twice as fast as one process with all threads, and bfloat16 pays only
# where the processor has it
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    launch=(accelerate launch) processes=1 precision=bf16
else
    processes=1
    while [ $((2 * processes)) -le "$(nproc)" ] && [ $processes -lt 64 ]; do processes=$((2 * processes)); done
    launch=(env ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node "$processes")
    precision=$(python -c "from zero123plus.loading import *; print('bf16' if cpu_has_bfloat16() else 'no')" 2>/dev/null)
fi

if [ "${1:-}" = "--smoke" ]; then
    printf '%s\n' mug-1000 car-1000 house-1000 > "$out/train.txt"
    printf '%s\n' mug-0 > "$out/heldout.txt"
    train=(--names "$out/train.txt") heldout=(--names "$out/heldout.txt") samples=1
    vae=(--minutes 0.3 --gate 0 --perceptual 0.03)
    unet=(--steps 2 --batch-size $((2 * processes)) --micro-batch-size 2 --validation-steps 2)
    score=(--steps 4)
    student=(--steps 2 --batch-size $((2 * processes)) --micro-batch-size 2 --lora-rank 2 --teacher-steps 2 --perceptual 3)
    pictures=(--steps 2 --batch-size $((2 * processes)) --micro-batch-size 2 --lora-rank 2 --validation-steps 2)
    OBJECTS="$out/tiny.sh3f"
    python - "$OBJECTS" <<'ARCHIVE'
import io, sys, zipfile
from PIL import Image
texture = io.BytesIO()
Image.new("RGB", (8, 8), (200, 120, 40)).save(texture, "PNG")
corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
sides = ("1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4")
obj = ["mtllib box.mtl", *(f"v {x} {y} {z}" for x, y, z in corners), "vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1", "usemtl wood"]
obj += ["f " + " ".join(f"{v}/{i}" for i, v in enumerate(side.split(), 1)) for side in sides]
fields = {"id": "Smoke#box", "name": "Box", "category": "Boxes", "creator": "nobody", "model": "/box/box.obj"}
with zipfile.ZipFile(sys.argv[1], "w") as archive:
    text = "license=CC0\n" + "".join(f"{key}#1={value}\n" for key, value in fields.items())
    archive.writestr("PluginFurnitureCatalog.properties", text)
    archive.writestr("box/box.obj", "\n".join(obj))
    archive.writestr("box/box.mtl", "newmtl wood\nKd 1 1 1\nmap_Kd wood.png\n")
    archive.writestr("box/wood.png", texture.getvalue())
ARCHIVE
else
    train=(--count 50) heldout=(--names lab/toys.txt) samples=8
    vae=(--minutes 120 --perceptual 0.03)
    unet=(--steps 40000 --micro-batch-size $((64 / processes)) --mixed-precision "$precision")
    score=()
    student=(--micro-batch-size $((32 / processes)) --mixed-precision "$precision" --lora-rank 32)
    student+=(--learning-rate 1e-3 --teacher-guidance 3.5 --perceptual 8)
    pictures=(--batch-size 16 --micro-batch-size $((16 / processes)) --mixed-precision "$precision" --steps 3750)
    pictures+=(--learning-rate 1e-3 --warmup-steps 20 --ema-decay 0.995 --decay-steps 1400)
fi

python -m lab.toys "${train[@]}" --output "$out/toys/train"
python -m lab.toys "${heldout[@]}" --output "$out/toys/heldout"
python -m training.render --objects "$out/toys/train" --samples "$samples" --output "$out/train/toys"
if [ -n "${OBJECTS:-}" ]; then
    python -m training.render --objects $OBJECTS --without lab/objects.jsonl --min-thickness 0.05 --min-cover 0.02 \
        --samples "$samples" --output "$out/train/objects"
fi
python -m training.render --objects "$out/toys/heldout" --samples "$samples" --output "$out/heldout"
python -m evaluation.heldout --renders "$out/heldout" --train-data "$out/train" --output "$out/groups/toys"
python -m lab.vae --data "$out/train" --validation "$out/heldout" --output "$out/vae" "${vae[@]}"
[ -d "$out/mini" ] || python -m lab.weights --vae "$out/vae" --output "$out/mini"
"${launch[@]}" -m training.train --phase scratch --in-memory --permute-colours --checkpoint "$out/mini" \
    --data "$out/train" --validation "$out/heldout" --output "$out/unet" "${unet[@]}"
checkpoint=$(ls -d "$out"/unet/checkpoint-* | sort -V | tail -1)
"${launch[@]}" -m training.train --phase student --in-memory --checkpoint "$checkpoint" --data "$out/train" \
    --validation "$out/heldout" --output "$out/student" "${student[@]}"
"${launch[@]}" -m training.train --phase pictures --checkpoint "$checkpoint" --data "$out/train" \
    --validation "$out/heldout" --output "$out/pictures" "${pictures[@]}"
python -m evaluation.evaluate --checkpoint "$checkpoint" --student "$out/student" --heldout "$out/groups/toys" \
    --output "$out/evaluation" "${score[@]}"
echo "$checkpoint"
