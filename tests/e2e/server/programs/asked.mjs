import { readFileSync } from "node:fs";

export const V1 = process.argv[2];
export const BYTES = readFileSync(process.argv[3]);
export const IMAGE = `data:image/png;base64,${BYTES.toString("base64")}`;
export const QUESTION = "What do you see at the top left?";
export const ANSWER = "a small pink ring.";
