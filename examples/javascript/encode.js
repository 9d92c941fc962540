// node encode.js "a cat" [preset] [dtype]: encode a prompt and print what came back, as JSON.

import { encode, rows } from "./qwen3-encoder.js";

const [prompt, preset = "z-image", dtype = "bfloat16"] = process.argv.slice(2);
const server = process.env.QWEN3_ENCODER_URL || "http://127.0.0.1:8000";
const apiKey = process.env.QWEN3_ENCODER_API_KEY;

try {
  const embeds = await encode(server, { prompt, preset, dtype }, { apiKey });
  const { shape, data } = rows(embeds, 0);
  console.log(JSON.stringify({
    model: embeds.model,
    preset: embeds.preset,
    shape: embeds.hiddenStates.shape,
    numTokens: embeds.numTokens,
    rows: shape,
    first: [...data.subarray(0, 4)],
  }));
} catch (error) {
  console.error(error.message, error.cause?.message ?? "");
  process.exitCode = 1;
}
