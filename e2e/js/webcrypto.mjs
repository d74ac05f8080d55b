// Node 18, Debian's, has this under another name. Imported before anything else.
import { webcrypto } from "node:crypto";

globalThis.crypto ??= webcrypto;
