#!/bin/sh
# The main job end to end on a laptop CPU: train Phase 1 on synthetic scenes, then measure it on scenes it never saw.
set -e
out=../demo

echo "== Phase 1, preset mini with ANGN gates, 3 epochs (about 6 minutes on 2 cores)"
mamba3-jepa train-jepa --preset mini --epochs 3 --angn-enabled --output-dir "$out"

echo "== 256 distinct scenes it never saw"
mamba3-jepa evaluate --checkpoint "$out/phase1_best.pt" --output "$out/test.json"

echo "== 256 scenes with colour-shape pairs that were kept out of training"
mamba3-jepa evaluate --checkpoint "$out/phase1_best.pt" --scenes compositional \
    --output "$out/test_compositional.json" --contact-sheet "$out/contact_sheet_compositional.png"

echo "Look at demo/contact_sheet.png and demo/plots/."
