// openai for JavaScript against a server (BITGEN_URL); prints what it saw as JSON. Needs NODE_PATH.
const { OpenAI } = require("openai");

const client = new OpenAI({ baseURL: `${process.env.BITGEN_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Who was Moses?" }];
const options = { model: "x", messages, max_tokens: 12, seed: 1 };

async function main() {
  const whole = await client.chat.completions.create(options);
  let streamed = "";
  let usage = null;
  const stream = { ...options, stream: true, stream_options: { include_usage: true } };
  for await (const part of await client.chat.completions.create(stream)) {
    streamed += part.choices[0]?.delta.content ?? "";
    usage = part.usage ?? usage;
  }
  const response = await client.responses.create({ model: "x", input: "Who was Moses?", max_output_tokens: 12 });
  const refused = await client.completions.create({ model: "x", prompt: "the ".repeat(600) }).catch((error) => error);
  const models = (await client.models.list()).data.map((model) => model.id);
  console.log(JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    tokens: [whole.usage.completion_tokens, usage.completion_tokens],
    response: response.output_text,
    refused: [refused.status, refused.code],
    models,
  }));
}

main();
