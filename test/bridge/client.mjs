// client.mjs BASE_URL KEY WRONG_KEY MODEL -- the main paths in the genuine JavaScript client; prints one JSON object for test_javascript.py to judge.
// The package lies in $NODE_PACKAGES, outside of the checkout's own files.
import { createRequire } from 'node:module';
const OpenAI = createRequire(process.env.NODE_PACKAGES + '/')('openai');

const [baseURL, apiKey, wrongKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60000 });
const messages = [{ role: 'user', content: 'Hi there' }];
const out = {};

async function caught(promise) {
	try { await promise; return null; }
	catch (e) {
		const kinds = ['AuthenticationError', 'PermissionDeniedError', 'NotFoundError', 'BadRequestError', 'RateLimitError', 'InternalServerError', 'APIUserAbortError'];
		return { kind: kinds.find((k) => e instanceof OpenAI[k]), status: e.status, code: e.code, requestID: Boolean(e.requestID) };
	}
}

out.models = (await client.models.list()).data.map((m) => m.id);
out.model = (await client.models.retrieve(model)).id;
out.chat = await client.chat.completions.create({ model, messages, max_tokens: 20, seed: 8, temperature: 1, logprobs: true });

out.streamed = '';
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 20, seed: 8, temperature: 1, stream: true, stream_options: { include_usage: true } })) {
	out.streamed += chunk.choices[0]?.delta.content ?? '';
	out.streamedUsage = chunk.usage;
	out.finish = chunk.choices[0]?.finish_reason ?? out.finish;
}
const helper = client.chat.completions.stream({ model, messages, max_tokens: 20, seed: 8, temperature: 1 });
out.helper = await helper.finalContent();

out.completions = (await client.completions.create({ model, prompt: ['The quick', 'Once'], max_tokens: 6, temperature: 0 })).choices.map((c) => c.text);
out.embeddings = (await client.embeddings.create({ model, input: ['x', 'The quick brown fox'] })).data.map((d) => Array.from(d.embedding));
out.embeddingsFloat = (await client.embeddings.create({ model, input: ['x', 'The quick brown fox'], encoding_format: 'float' })).data.map((d) => d.embedding);
out.requestID = (await client.chat.completions.create({ model, messages, max_tokens: 1 }))._request_id;

out.unauthorized = await caught(new OpenAI({ baseURL, apiKey: wrongKey, maxRetries: 0 }).models.list());
out.notFound = await caught(client.models.retrieve('no-such-model'));
out.badRequest = await caught(client.chat.completions.create({ model, messages, nonsense: 1 }));
out.tooLong = await caught(client.chat.completions.create({ model, messages: [{ role: 'user', content: 'word '.repeat(20000) }], stream: true }));

// abort() in the middle of a stream
const stream = await client.chat.completions.create({ model, messages, max_tokens: 8000, temperature: 0, stream: true });
let n = 0;
try { for await (const chunk of stream) if (chunk && ++n === 3) stream.controller.abort(); } catch (e) { out.aborted = e.constructor.name; }
out.read = n;
out.parallel = (await Promise.all([1, 2, 3, 4, 5, 6, 7, 8].map((seed) => client.chat.completions.create({ model, messages, max_tokens: 10, temperature: 1, seed })))).map((r) => r.choices[0].message.content);
console.log(JSON.stringify(out));
