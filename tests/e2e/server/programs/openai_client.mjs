// OpenAI's own package: chat, helpers, Responses; each answer is sent back whole.
import assert from "node:assert";
import OpenAI from "openai";
import { ANSWER, IMAGE, QUESTION, V1 } from "./asked.mjs";

const client = new OpenAI({ baseURL: V1, apiKey: "none", maxRetries: 0 });
const asked = {
  role: "user",
  content: [{ type: "image_url", image_url: { url: IMAGE } }, { type: "text", text: QUESTION }],
};
const again = { role: "user", content: QUESTION };
const parameters = { type: "object", properties: { colour: { enum: ["red", "blue"] } }, required: ["colour"] };
const tools = [{ type: "function", function: { name: "paint", parameters } }];
const options = { model: "any", temperature: 0, max_tokens: 80 };

const first = await client.chat.completions.create({ ...options, messages: [asked] });
assert.equal(first.choices[0].message.content, ANSWER);
assert((await client.chat.completions.create({ ...options, messages: [asked, first.choices[0].message, again] })).choices);

const stream = client.chat.completions.stream({ ...options, messages: [asked], stream_options: { include_usage: true } });
const streamed = await stream.finalChatCompletion();
assert.equal(streamed.choices[0].message.content, ANSWER);
assert(streamed.usage.completion_tokens > 0);

const response_format = { type: "json_schema", json_schema: { name: "seen", schema: parameters, strict: true } };
const parsed = await client.chat.completions.parse({ ...options, messages: [asked], response_format });
assert(["red", "blue"].includes(parsed.choices[0].message.parsed.colour));
assert((await client.chat.completions.create({ ...options, messages: [asked, parsed.choices[0].message, again] })).choices);

const forced = client.chat.completions.stream({ ...options, messages: [asked], tools, tool_choice: "required" });
const called = (await forced.finalChatCompletion()).choices[0].message;
const result = { role: "tool", tool_call_id: called.tool_calls[0].id, content: "painted" };
assert((await client.chat.completions.create({ ...options, messages: [asked, called, result], tools })).choices);

const input = [
  { role: "user", content: [{ type: "input_image", image_url: IMAGE }, { type: "input_text", text: QUESTION }] },
];
const response = await client.responses.create({ model: "any", temperature: 0, input });
assert.equal(response.output_text, ANSWER);
for (const more of [{ input: [...input, ...response.output, again] }, { input: [again], previous_response_id: response.id }])
  assert((await client.responses.create({ model: "any", temperature: 0, ...more })).output_text);
