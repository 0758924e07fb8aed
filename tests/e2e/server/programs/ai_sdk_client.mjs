// The Vercel AI SDK: its default provider (Responses) and the one for compatible servers.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { ANSWER, BYTES, QUESTION, V1 } from "./asked.mjs";

const asked = {
  role: "user",
  content: [{ type: "file", data: BYTES, mediaType: "image/png" }, { type: "text", text: QUESTION }],
};
const seen = z.object({ colour: z.enum(["red", "blue"]) });
const paint = tool({ description: "Paint.", inputSchema: seen, execute: async ({ colour }) => `painted ${colour}` });
const models = [
  createOpenAI({ baseURL: V1, apiKey: "none" })("any"),
  createOpenAI({ baseURL: V1, apiKey: "none" }).chat("any"),
  createOpenAICompatible({ name: "here", baseURL: V1, supportsStructuredOutputs: true })("any"),
];
for (const model of models) {
  const options = { model, temperature: 0, maxOutputTokens: 80, maxRetries: 0 };
  const first = await generateText({ ...options, messages: [asked] });
  assert.equal(first.text, ANSWER);
  const more = [asked, ...(first.responseMessages ?? first.response.messages), { role: "user", content: QUESTION }];
  assert((await generateText({ ...options, messages: more })).text);
  let text = "";
  for await (const piece of streamText({ ...options, messages: [asked] }).textStream) text += piece;
  assert.equal(text, ANSWER);
  const typed = await generateText({ ...options, messages: [asked], output: Output.object({ schema: seen }) });
  assert(["red", "blue"].includes(typed.output.colour));
  const offered = await generateText({ ...options, messages: [asked], tools: { paint } });
  assert(offered.text !== undefined);
  const forced = await generateText({
    ...options,
    messages: [asked],
    tools: { paint },
    toolChoice: "required",
    stopWhen: stepCountIs(2),
  });
  assert(forced.steps[0].toolResults[0].output.startsWith("painted"));
}
