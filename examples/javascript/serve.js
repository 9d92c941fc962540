// node serve.js [port]: the page and the service under one origin, for trying the page out on this machine.

import { createReadStream, existsSync } from "node:fs";
import http from "node:http";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const FOLDER = dirname(fileURLToPath(import.meta.url));
const TYPES = { ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript" };
const SERVICE = new URL(process.env.QWEN3_ENCODER_URL || "http://127.0.0.1:8000");
const KEY = process.env.QWEN3_ENCODER_API_KEY; // added here, so that the page need not know it
const PASSED_ON = ["/encode"];

function serveFile(path, response) {
  const file = join(FOLDER, normalize(path === "/" ? "/browser.html" : path)); // normalized, it cannot leave the folder
  const type = TYPES[extname(file)];
  if (!type || !existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": type });
  createReadStream(file).pipe(response);
}

function passOn(request, path, response) {
  const headers = { "content-type": request.headers["content-type"] ?? "", accept: request.headers.accept ?? "" };
  if (KEY) headers.authorization = `Bearer ${KEY}`;
  const onward = http.request(new URL(path, SERVICE), { method: request.method, headers }, (reply) => {
    response.writeHead(reply.statusCode, reply.headers);
    reply.pipe(response);
  });
  onward.on("error", (error) => {
    if (response.headersSent) response.destroy();
    else response.writeHead(502).end(`${error.message}\n`);
  });
  response.on("close", () => onward.destroy());
  request.pipe(onward);
}

const server = http.createServer((request, response) => {
  const { port } = server.address();
  // A page elsewhere may give its own name the address of this machine; the service checks the same.
  if (![`127.0.0.1:${port}`, `localhost:${port}`].includes(request.headers.host)) return response.writeHead(403).end();
  const path = request.url.split("?")[0];
  if (PASSED_ON.includes(path)) return passOn(request, path, response);
  if (request.method !== "GET") return response.writeHead(405).end();
  serveFile(path, response);
});
server.listen(Number(process.argv[2] ?? 8080), "127.0.0.1", () => {
  console.log(`http://127.0.0.1:${server.address().port}/`);
});
