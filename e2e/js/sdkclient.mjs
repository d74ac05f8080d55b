// Asks for tokens with @azure/identity, as an application would, and prints one
// JSON line for each credential that it tried. Arguments, output and rules are
// those of ../cmd/sdkclient.

import "./webcrypto.mjs";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { DefaultAzureCredential, ManagedIdentityCredential } from "@azure/identity";

const scope = "https://management.azure.com/.default";

function credential(name) {
  const cut = name.indexOf("=");
  const kind = cut < 0 ? name : name.slice(0, cut);
  const value = name.slice(kind.length + 1);
  switch (kind) {
    case "default":
      return new DefaultAzureCredential();
    case "system":
      return new ManagedIdentityCredential();
    case "client-id":
      return new ManagedIdentityCredential({ clientId: value });
    case "object-id":
      return new ManagedIdentityCredential({ objectId: value });
    case "resource-id":
      return new ManagedIdentityCredential({ resourceId: value });
    default:
      throw new Error(`unknown credential "${name}"`);
  }
}

// attempt makes one credential and asks it for one token.
async function attempt(name, file) {
  const line = { credential: name, claims: {}, expires_on: 0, file: "", error: "", took_ms: 0 };
  const start = performance.now();
  try {
    const { token, expiresOnTimestamp } = await credential(name).getToken(scope);
    line.took_ms = performance.now() - start;
    const { aud, oid, appid } = JSON.parse(Buffer.from(token.split(".")[1], "base64url"));
    writeFileSync(file, token, { mode: 0o600 });
    Object.assign(line, { claims: { aud, oid, appid }, expires_on: Math.floor(expiresOnTimestamp / 1000), file });
  } catch (err) {
    line.took_ms = performance.now() - start;
    line.error = String(err.message);
  }
  return line;
}

const { values, positionals } = parseArgs({ options: { tokens: { type: "string" } }, allowPositionals: true });
if (!values.tokens || positionals.length === 0) {
  console.error("sdkclient: want --tokens DIR and credentials");
  process.exit(1);
}
for (const [i, name] of positionals.entries()) {
  console.log(JSON.stringify(await attempt(name, join(values.tokens, `${i}.jwt`))));
}
