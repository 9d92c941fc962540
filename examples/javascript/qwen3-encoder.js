// A client of the service for Node 18 or later and for browsers. Types: qwen3-encoder.d.ts.

import { decode } from "@msgpack/msgpack";

const PASSING = [429, 502, 503]; // busy, a proxy that does not reach the service, one that starts or ends
const MAX_WAIT_MS = 60_000; // for a service that is busy or restarts, all together
const FIRST_WAIT_MS = 500; // where the service does not say how long; doubled each time
const LONGEST_WAIT_MS = 4_000;

/** The service refused, failed, or something else answered. */
export class EncoderError extends Error {
  constructor(status, code, message, hint) {
    super(hint ? `${message} ${hint}` : message);
    this.name = "EncoderError";
    this.status = status;
    this.code = code;
  }
}

/** POST /encode: prompts to hidden states. `body` has its fields: prompt or prompts, preset, dtype and so on. */
export async function encode(server, body, { apiKey, signal, maxWaitMs = MAX_WAIT_MS } = {}) {
  const headers = { accept: "application/msgpack", "content-type": "application/json" };
  if (apiKey) headers.authorization = `Bearer ${apiKey}`;
  const address = new URL("encode", withSlash(server));
  const request = { method: "POST", headers, body: JSON.stringify(body), signal, redirect: "error" };
  for (let waitMs = FIRST_WAIT_MS; ; waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS)) {
    let pauseMs = waitMs;
    try {
      const response = await fetch(address, request);
      if (response.ok) return await read(response);
      const seconds = parseFloat(response.headers.get("retry-after") ?? "");
      if (Number.isFinite(seconds)) pauseMs = Math.max(0, seconds * 1000);
      if (!PASSING.includes(response.status) || pauseMs > maxWaitMs) throw await refusal(response);
      await response.body?.cancel();
    } catch (error) {
      // A TypeError of fetch is a connection that was refused or broke off.
      if (!(error instanceof TypeError) || pauseMs > maxWaitMs) throw error;
    }
    pauseMs *= 1 + Math.random() / 10; // so that many do not come back at the same moment
    maxWaitMs -= pauseMs;
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
    signal?.throwIfAborted();
  }
}

/** A tensor from the wire as numbers: { dtype, shape, data } with a Float32Array, or a Uint8Array for bool. */
export function toTensor({ dtype, shape, data }) {
  const convert = { bfloat16, float16, float32, bool: (bytes) => bytes.slice() }[dtype];
  if (!convert) throw new EncoderError(undefined, "unknown_dtype", `dtype ${dtype} is unknown.`);
  return { dtype, shape, data: convert(data) };
}

/** The real rows of one prompt, one after the other; of hidden states (B, L, D), where nothing is stacked. */
export function rows({ hiddenStates, attentionMask }, index) {
  const [, length, width] = hiddenStates.shape;
  if (hiddenStates.shape.length !== 3) throw new RangeError("rows: these hidden states are stacked.");
  const real = [...Array(length).keys()].filter((row) => attentionMask.data[index * length + row]);
  const data = new Float32Array(real.length * width);
  real.forEach((row, place) => {
    const start = (index * length + row) * width;
    data.set(hiddenStates.data.subarray(start, start + width), place * width);
  });
  return { dtype: hiddenStates.dtype, shape: [real.length, width], data };
}

async function read(response) {
  const type = response.headers.get("content-type") ?? "";
  if (!type.startsWith("application/msgpack")) {
    throw new EncoderError(response.status, "unexpected_reply", `${response.url} answered with ${type || "no type"}.`);
  }
  const reply = decode(new Uint8Array(await response.arrayBuffer()));
  return {
    model: reply.model,
    preset: reply.preset,
    hiddenStates: toTensor(reply.hidden_states),
    attentionMask: toTensor(reply.attention_mask),
    numTokens: reply.num_tokens,
    truncated: reply.truncated,
  };
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { code, message, hint } = JSON.parse(text).error;
    return new EncoderError(response.status, code, message, hint);
  } catch {
    return new EncoderError(response.status, "http_error", `${response.status}: ${text.slice(0, 200)}`);
  }
}

// Typed arrays have the byte order of the machine, which is little-endian like the wire wherever browsers and Node run.
// `slice` copies to the start of a buffer of its own: inside the reply the bytes may lie at an odd place.

function float32(bytes) {
  return new Float32Array(bytes.slice().buffer);
}

function bfloat16(bytes) {
  const upper = new Uint16Array(bytes.slice().buffer); // the upper half of a float32
  const bits = new Uint32Array(upper.length);
  for (let i = 0; i < upper.length; i++) bits[i] = upper[i] << 16;
  return new Float32Array(bits.buffer);
}

function float16(bytes) {
  const halves = new Uint16Array(bytes.slice().buffer);
  return Float32Array.from(halves, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 0x1f;
    const fraction = half & 0x3ff;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

function withSlash(server) {
  return server.endsWith("/") ? server : `${server}/`;
}
