#!/bin/sh
# The whole story on a laptop CPU: three phases on synthetic scenes, questions about pictures, an agent with tools, export,
# verification, and the same answers in Rust.
set -e
out=${DEMO_OUTPUT:-../demo}
preset=${DEMO_PRESET:-mini}

echo "== Phase 1 (JEPA): predict the embedding of the answer"
mamba3-jepa train-jepa --preset "$preset" --angn-enabled --output-dir "$out/phase1" ${DEMO_PHASE1_FLAGS:-}

echo "== Phase 2: the decoder learns to say it"
mamba3-jepa train-decoder --phase1-checkpoint "$out/phase1/phase1_best.pt" --output-dir "$out/phase2"

echo "== Phase 3: the model notices its own confusion, and takes knowledge in"
mamba3-jepa train-agent --phase2-checkpoint "$out/phase2/phase2_best.pt" --output-dir "$out/phase3"

echo "== Scenes it never saw"
mamba3-jepa evaluate --checkpoint "$out/phase3/phase3_best.pt" --output "$out/test.json" \
    --answer-sheet "$out/answers.png" --answers-plot "$out/answers_by_type.png"

echo "== A question about a picture"
rm -rf "$out/scenes"
mamba3-jepa prepare scenes --output "$out/scenes" --scenes 25
mamba3-jepa ask --checkpoint "$out/phase3/phase3_best.pt" --image "$out/scenes/images/0000.png" \
    "how many objects are there?" "what shape is at the top left?" "what color is the star?"

echo "== An agent: where it is confused it calls a tool, and looks again"
tools=../examples/tools/tools.json
mamba3-jepa agent --checkpoint "$out/phase3/phase3_best.pt" --image "$out/scenes/images/0000.png" --tools "$tools" \
    --trace "$out/trace.json" "how many objects are there?" "How much is 8 - 6?"

echo "== Export, verified"
mamba3-jepa export --checkpoint "$out/phase3/phase3_best.pt" --output "$out/weights" --phase 3 --x-encoder --verify --golden

echo "== The same model in Rust: every golden tensor computed again, and the same questions answered by both"
rust=${KORE_VLJEPA:-../rust/target/release/kore-vljepa}
"$rust" verify "$out/weights"
"$rust" ask --weights "$out/weights" --image "$out/scenes/images/0000.png" \
    "how many objects are there?" "what shape is at the top left?" "what color is the star?"
python scripts/side_by_side.py --checkpoint "$out/phase3/phase3_best.pt" --weights "$out/weights" --data-dir "$out/scenes"

echo "== Two agents, step by step"
python scripts/side_by_side.py --checkpoint "$out/phase3/phase3_best.pt" --weights "$out/weights" --data-dir "$out/scenes" \
    --manifest demonstrations.jsonl --tools "$tools"

echo "Look at $out/answers.png, $out/answers_by_type.png, $out/phase*/plots/, $out/trace.json and $out/weights/."
