// OpenAI's agents: an image, a typed answer, a tool, and a second turn, over both APIs.
import assert from "node:assert";
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";
import { ANSWER, IMAGE, QUESTION, V1 } from "./asked.mjs";

setTracingDisabled(true);
const client = new OpenAI({ baseURL: V1, apiKey: "none", maxRetries: 0 });
const seen = z.object({ colour: z.enum(["red", "blue"]) });
const paint = tool({ name: "paint", description: "Paint.", parameters: seen, execute: async ({ colour }) => `painted ${colour}` });
const asked = [{ role: "user", content: [{ type: "input_image", image: IMAGE }, { type: "input_text", text: QUESTION }] }];
const modelSettings = { temperature: 0, maxTokens: 80 };
for (const model of [new OpenAIChatCompletionsModel(client, "any"), new OpenAIResponsesModel(client, "any")]) {
  const agent = new Agent({ name: "plain", model, modelSettings });
  const first = await run(agent, asked);
  assert.equal(first.finalOutput, ANSWER);
  assert((await run(agent, [...first.history, { role: "user", content: QUESTION }])).finalOutput);
  const streamed = await run(agent, asked, { stream: true });
  for await (const _ of streamed) continue;
  assert.equal(streamed.finalOutput, ANSWER);
  const typed = await run(new Agent({ name: "typed", model, modelSettings, outputType: seen }), asked);
  assert(["red", "blue"].includes(typed.finalOutput.colour));
  assert((await run(new Agent({ name: "offered", model, modelSettings, tools: [paint] }), asked)).finalOutput);
  const forced = new Agent({ name: "forced", model, modelSettings: { ...modelSettings, toolChoice: "required" }, tools: [paint] });
  assert((await run(forced, asked)).newItems.some((item) => item.type === "tool_call_output_item"));
}
