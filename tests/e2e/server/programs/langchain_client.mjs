// LangChain's ChatOpenAI: an image, a stream, a typed answer, tools that it may and must call, and a second round.
import assert from "node:assert";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import { ANSWER, IMAGE, QUESTION, V1 } from "./asked.mjs";

const seen = z.object({ colour: z.enum(["red", "blue"]) });
const paint = tool(async ({ colour }) => `painted ${colour}`, { name: "paint", description: "Paint.", schema: seen });
const image = { type: "image_url", image_url: { url: IMAGE } };
const asked = new HumanMessage({ content: [image, { type: "text", text: QUESTION }] });
for (const useResponsesApi of [false, true]) {
  const model = new ChatOpenAI({
    model: "any", apiKey: "none", temperature: 0, maxTokens: 80, maxRetries: 0, useResponsesApi,
    configuration: { baseURL: V1 },
  });
  const first = await model.invoke([asked]);
  assert.equal(first.text, ANSWER);
  let streamed = "";
  for await (const chunk of await model.stream([asked])) streamed += chunk.text;
  assert.equal(streamed, ANSWER);
  const typed = await model.withStructuredOutput(seen, { method: "jsonSchema" }).invoke([asked]);
  assert(["red", "blue"].includes(typed.colour));
  assert((await model.invoke([asked, first, new HumanMessage(QUESTION)])).text);
  assert((await model.bindTools([paint]).invoke([asked])).text);
  // Over Responses it leaves "required" out of the request.
  const choice = { tool_choice: useResponsesApi ? "paint" : "required" };
  const called = await model.bindTools([paint], choice).invoke([asked]);
  assert.equal(called.tool_calls[0].name, "paint");
  const result = new ToolMessage({ content: "painted", tool_call_id: called.tool_calls[0].id });
  assert(await model.bindTools([paint]).invoke([asked, called, result]));
}
