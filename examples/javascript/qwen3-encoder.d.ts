export interface Tensor<Data = Float32Array> {
  /** Of the wire: "bfloat16", "float16", "float32" or "bool". */
  dtype: string;
  shape: number[];
  /** In C order. */
  data: Data;
}

export interface Embeds {
  model: string;
  preset: string;
  /** (B, L, D); stacked presets have one axis more. */
  hiddenStates: Tensor;
  /** (B, L): 1 where a row belongs to a real token. */
  attentionMask: Tensor<Uint8Array>;
  numTokens: number[];
  truncated: boolean[];
}

/** The fields of POST /encode. */
export interface EncodeRequest {
  prompt?: string;
  prompts?: string[];
  preset?: string;
  max_sequence_length?: number;
  padding?: "preset" | "longest" | "max_length" | "none";
  dtype?: "bfloat16" | "float16" | "float32";
  prefix?: string;
  suffix?: string;
}

export interface Options {
  apiKey?: string;
  signal?: AbortSignal;
  /** Longest wait for a service that is busy or restarts, all attempts together. */
  maxWaitMs?: number;
}

export class EncoderError extends Error {
  status: number | undefined;
  code: string;
}

export function encode(server: string, body: EncodeRequest, options?: Options): Promise<Embeds>;
export function rows(embeds: Embeds, index: number): Tensor;
export function toTensor(value: { dtype: string; shape: number[]; data: Uint8Array }): Tensor | Tensor<Uint8Array>;
