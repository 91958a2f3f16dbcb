#!/usr/bin/env bash
# The part of the mini's recipe that wants a GPU, for a machine without network that is there for minutes.
#
#     DATA=data/train VALIDATION=data/heldout OUT=out/gpu bash lab/gpu.sh
#     ... bash lab/gpu.sh --smoke     # two steps of everything, on any machine
#     ... bash lab/gpu.sh unet        # parts alone: unet, decoder, controlnets; without a name all
#
# unet: the UNet, from CHECKPOINT or else from random weights, for MINUTES; its rate falls to 0 in the last two fifths.
# decoder: that of the VAE in the folder VAE, for VAE_MINUTES; the encoder, and so the latents, stay the same.
# controlnets: depth, and the generator of normals, for CONTROL_MINUTES, of the UNet that was trained in OUT, or else of
# CHECKPOINT, or else of this repository.
#
# Nothing is compiled: torch 2.11 compiled the UNet for 7 minutes on an H100, and the first backward pass then failed.
#
# DATA and VALIDATION are folders of shards, which lie decoded on the GPU: 1,000 toys take 0.9 GB there. CONTROL is a
# folder of shards with depth, normals and alpha, for all but the UNet; DATA if not set.
#
# The results are in OUT/result, in half precision and in files of at most 15 MB: `cat NAME.tar.* | tar x` gives `decayed`,
# the weights to publish; `constant`, those before the rate fell, to train on from; `vae`; and `controlnets`. A file
# NAME.done says that NAME is whole.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu} vae=${VAE:-vae} control=${CONTROL:-$DATA}
minutes=${MINUTES:-6} vae_minutes=${VAE_MINUTES:-4} control_minutes=${CONTROL_MINUTES:-2.5}
mkdir -p "$out/result" "$out/decoder"
# On 16 cores five processes of all threads each read 12 objects a second, beside a compilation; of two threads each, 240
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

train=(python -m training.train --phase scratch --in-memory --permute-colours --report-to none --save-minutes 1000 --keep 1)
if [ "${1:-}" = "--smoke" ]; then
    shift
    train+=(--batch-size 2 --micro-batch-size 2)
    unet=(--steps 4 --decay-steps 2 --validation-steps 2) controlnet=(--steps 2)
    decoder=(--minutes 0.1 --batch-size 8 --gate 0)
else
    train+=(--batch-size 256 --mixed-precision bf16 --workers 4)
    timed=(--lr-scheduler timed --steps 1000000 --decay-steps 400000)
    unet=("${timed[@]}" --minutes "$minutes" --batch-size 512 --micro-batch-size 512 --learning-rate 3e-3
        --ema-decay 0.998 --validation-steps 500)
    # Two ControlNets share the GPU's memory
    controlnet=("${timed[@]}" --minutes "$control_minutes" --micro-batch-size 128 --validation-steps 1000000)
    decoder=(--minutes "$vae_minutes" --batch-size 64 --mixed-precision bf16)
fi

# The newest checkpoint of a run
newest() {
    ls -d "$1"/checkpoint-* | sort -V | tail -1
}

# The checkpoint that ControlNets start from
trained() {
    if [ -d "$out/unet" ]; then newest "$out/unet"; else echo "${CHECKPOINT:-.}"; fi
}

# Packs parts of a folder under a name
pack() {
    tar c -C "$2" "${@:3}" | split -b 15M -d - "$out/result/$1.tar."
    touch "$out/result/$1.done"
}

train_unet() {
    if [ -z "${CHECKPOINT:-}" ] && [ ! -d "$out/start" ]; then
        python -m lab.weights --vae "$vae" --output "$out/start"
    fi
    "${train[@]}" --checkpoint "${CHECKPOINT:-$out/start}" --data "$DATA" --validation "$VALIDATION" --output "$out/unet" "${unet[@]}"
    local name
    for name in decayed constant; do
        local checkpoint=$(ls -d "$out"/unet/checkpoint-* | sort -V | { [ $name = decayed ] && tail -1 || head -1; })
        python -m training.publish --checkpoint "$checkpoint" --output "$out/$name"
        # The text encoder is random and never trained, but the UNet knows this one only
        pack $name "$out/$name" unet vision_encoder text_encoder tokenizer scheduler model_index.json
    done
    cp -r "$out/unet/log.jsonl" "$out/unet/validation" "$out/result"
}

train_decoder() {
    python -m lab.vae --checkpoint "$vae" --data "$control" --validation "$VALIDATION" --output "$out/vae" "${decoder[@]}" \
        > "$out/result/vae.log" 2>&1
    cp -rT "$(newest "$out/vae")" "$out/decoder/vae" && rm -r "$out/decoder/vae/state"
    pack vae "$out/decoder" vae
}

# A condition, and the name of the component
train_controlnet() {
    "${train[@]}" --phase controlnet --condition "$1" --checkpoint "$trained" --controlnet "$out/small" \
        --data "$control" --output "$out/$2" --image-sizes 0 0 --snr-gamma 0 --optimizer muon --learning-rate 1e-3 \
        --warmup-steps 50 --ema-decay 0.99 "${controlnet[@]}"
    python -m training.publish --controlnet "$(newest "$out/$2")" --name "$2" --output "$out/controlnets"
}

train_controlnets() {
    trained=$(trained)
    [ -d "$out/small" ] || python -m lab.weights --checkpoint "$trained" --controlnet --output "$out/small"
    train_controlnet depth controlnet > "$out/result/depth.log" 2>&1 &
    train_controlnet rgb controlnet_normals > "$out/result/normals.log" 2>&1 &
    wait
    pack controlnets "$out/controlnets" .  # what was finished
}

for part in "${@:-unet decoder controlnets}"; do
    for name in $part; do "train_$name"; done
done
