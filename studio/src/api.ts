// The server's requests. The token is in the page's URL; no cookie holds it.

const token = new URLSearchParams(location.search).get("token") ?? "";
/** By which a page knows the changes that it made itself. */
export const page = crypto.randomUUID();

export type Layer = "shown" | "mark" | "result" | "before";
export type JobState = "waiting" | "running" | "paused" | "done" | "failed" | "stopped";

export interface Job {
  project: string;
  number: number;
  kind: "follow" | "export";
  request: Record<string, unknown>;
  state: JobState;
  done: number;
  total: number | null;
  rate: number;
  message: string;
  memory: { run?: string; file?: string; part?: number };
}

export interface StudioObject {
  id: number;
  name: string;
  colour: string;
}

/** A frame that deserves a look. */
export interface Look {
  frame: number;
  kind: "lost" | "size" | "confidence";
  why: string;
}

export interface ProjectState {
  id: string;
  title: string;
  path: string;
  width: number;
  height: number;
  count: number;
  exact: boolean;
  /** Whether it is still being found out where each frame is. */
  reading: boolean;
  rate: number;
  objects: StudioObject[];
  marks: number[];
  frames: number[];
  confidence: (number | null)[];
  before: number[];
  look: Look[];
  jobs: Job[];
  exports: { name: string; bytes: number }[];
  export_kinds: { kind: string; title: string; about: string }[];
  model: string;
  /** The licence of its installed weights; empty if it uses none. */
  weights: string;
  size: number;
  sizes: number[];
  device: string;
  click: string | null;
  command: string;
}

export type ServerEvent =
  | { type: "job"; project: string; job: Job; frame?: number; confidence?: number | null }
  | { type: "project"; project: string; by?: string; frame?: number }
  | { type: "again" };

async function request(path: string, options: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { ...options, headers: { "x-vosops-token": token, "x-vosops-page": page } });
  } catch {
    throw new Error("the server does not answer: is vosops studio still running?");
  }
  if (!response.ok) {
    const text = await response.text();
    let message = text;
    try {
      message = JSON.parse(text).error ?? text;
    } catch {
      // the answer is plain text
    }
    throw new Error(message || `the server answered ${response.status}`);
  }
  return response;
}

async function json<T>(path: string, method = "GET", content?: unknown): Promise<T> {
  const body = content === undefined ? undefined : JSON.stringify(content);
  return (await request(path, { method, body })).json();
}

async function words(path: string, options?: RequestInit): Promise<Uint32Array | null> {
  const response = await request(path, options);
  return response.status === 204 ? null : new Uint32Array(await response.arrayBuffer());
}

export const projects = () => json<{ id: string; title: string; path: string }[]>("api/projects");

/** Send a file as it is; `progress` is told the share that has arrived. */
export function upload(file: File, progress: (share: number) => void): Promise<{ id: string }> {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", `api/upload?name=${encodeURIComponent(file.name)}`);
    sending.setRequestHeader("x-vosops-token", token);
    sending.upload.onprogress = (event) => progress(event.loaded / Math.max(1, event.total));
    sending.onerror = () => reject(new Error("the server does not answer: is vosops studio still running?"));
    sending.onload = () => {
      if (sending.status === 200) return resolve(JSON.parse(sending.responseText));
      let message = sending.responseText;
      try {
        message = JSON.parse(message).error ?? message;
      } catch {
        // the answer is plain text
      }
      reject(new Error(message));
    };
    sending.send(file);
  });
}

export class ProjectApi {
  private readonly base: string;

  constructor(readonly id: string) {
    this.base = `api/projects/${encodeURIComponent(id)}`;
  }

  state = () => json<ProjectState>(this.base);

  thumbnail = (frame: number) => `${this.base}/frames/${frame}/thumbnail.jpg?token=${encodeURIComponent(token)}`;

  picture = async (frame: number, size: "preview" | "whole") =>
    (await request(`${this.base}/frames/${frame}/${size}.jpg`)).blob();

  labels = (frame: number, layer: Layer) => words(`${this.base}/frames/${frame}/labels/${layer}`);

  writeMark = (frame: number, runs: Uint32Array<ArrayBuffer>) =>
    request(`${this.base}/frames/${frame}/mark`, { method: "PUT", body: runs });

  removeMark = (frame: number) => request(`${this.base}/frames/${frame}/mark`, { method: "DELETE" });

  box = (frame: number, box: number[]) =>
    words(`${this.base}/frames/${frame}/box`, { method: "POST", body: JSON.stringify({ box }) });

  click = (frame: number, points: number[][]) =>
    words(`${this.base}/frames/${frame}/click`, { method: "POST", body: JSON.stringify({ points }) });

  readMask = (frame: number, file: File) =>
    words(`${this.base}/frames/${frame}/read?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });

  writeObjects = (objects: { id: number; name: string }[]) =>
    json(`${this.base}/objects`, "PUT", { objects: objects.map(({ id, name }) => ({ id, name })) });

  writeSettings = (settings: { size: number }) => json(`${this.base}/settings`, "PUT", settings);

  submit = (kind: "follow" | "export", wish: Record<string, unknown>) =>
    json<{ number: number }>(`${this.base}/jobs`, "POST", { kind, request: wish });

  job = (number: number, action: "pause" | "resume" | "stop") =>
    json<{ state: JobState; again: number | null }>(`${this.base}/jobs/${number}/${action}`, "POST");

  discard = () => json(`${this.base}/runs/last`, "DELETE");

  download = (name: string) => `${this.base}/exports/${encodeURIComponent(name)}?token=${encodeURIComponent(token)}`;
}

/** Listen to the server; after a break it listens again, and says so. */
export function listen(heard: (event: ServerEvent) => void, connected: (now: boolean) => void): void {
  const address = new URL(`api/events?token=${encodeURIComponent(token)}`, location.href);
  address.protocol = "ws:";
  const socket = new WebSocket(address);
  socket.onopen = () => connected(true);
  socket.onmessage = (message) => heard(JSON.parse(message.data));
  socket.onclose = () => {
    connected(false);
    setTimeout(() => listen(heard, connected), 1500);
  };
}
