// What the page knows and does. Components read it and call it; it tells them when something changed.

import { useEffect, useState } from "preact/hooks";
import { type Job, type Layer, type Look, page, ProjectApi, type ProjectState, type ServerEvent, type StudioObject } from "./api";
import { decode, encode, History, LabelMap, type Point, type Rect, union } from "./labels";

export type Tool = "brush" | "eraser" | "polygon" | "fill" | "box" | "click" | "hand";

/** What was on a frame before clicks selected something on it. */
interface Selected {
  frame: number;
  before: Uint8Array;
}

const PICTURE_BYTES = 64 << 20; // of decoded pictures that are kept
const STILL = 150; // milliseconds that a frame is looked at before it is fetched at its own size
const MOST_OBJECTS = 254;

export class Store {
  readonly api: ProjectApi;
  readonly history = new History();
  frame = 0;
  tool: Tool = "brush";
  object = 1;
  brush: number;
  protect = false;
  masks = true;
  compare = false;
  opacity = 0.5;
  playing = false;
  watch = true;
  busy = "";
  /** Strokes that are on their way to the server. */
  pending = 0;
  message: { text: string; bad: boolean } | null = null;
  online = true;
  labels: LabelMap;
  before: LabelMap | null = null;
  picture: ImageBitmap | null = null;
  pictureFrame = -1;
  /** The frame that could not be shown. */
  failed = -1;
  /** Counts changes of what is known of the frames, for the time line. */
  arrivals = 0;
  /** Counts changes of labels, for what draws them. */
  version = 0;
  changed: Rect | null = null;

  private listeners = new Set<() => void>();
  private pictures = new Map<string, ImageBitmap>();
  private fetching = new Map<string, Promise<ImageBitmap>>();
  private showing = 0;
  private loading: Promise<void> | null = null;
  private sharpening = -1;
  private spare: Uint8Array | null = null;
  private selected: Selected | null = null;
  private stroke: { before: LabelMap; rect: Rect | null } | null = null;
  private saving: Promise<unknown> = Promise.resolve();
  private refreshing = false;
  private again = false;
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(public state: ProjectState) {
    this.api = new ProjectApi(state.id);
    this.labels = new LabelMap(state.width, state.height);
    this.brush = Math.max(4, Math.round(Math.min(state.width, state.height) / 40));
    this.object = state.objects[0]?.id ?? 1;
    this.frame = this.marked[0] ?? 0;
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  notify(): void {
    for (const listener of this.listeners) listener();
  }

  get marked(): number[] {
    return this.state.marks;
  }

  /** Whether the frame that one is on is the one that is seen: only then it may be drawn on. */
  get ready(): boolean {
    return this.pictureFrame === this.frame;
  }

  get last(): number {
    return this.state.count - 1;
  }

  get following(): Job | undefined {
    return this.state.jobs.find((job) => job.kind === "follow" && ["running", "waiting"].includes(job.state));
  }

  get paused(): Job | undefined {
    const latest = this.state.jobs.find((job) => job.kind === "follow");
    return latest?.state === "paused" ? latest : undefined;
  }

  /** The next frame that deserves a look, in the order of the video; after the last one the first. */
  get nextLook(): Look | undefined {
    const inOrder = [...this.state.look].sort((a, b) => a.frame - b.frame);
    return inOrder.find((entry) => entry.frame > this.frame) ?? inOrder[0];
  }

  colour(id: number): string {
    return this.state.objects.find((object) => object.id === id)?.colour ?? "#888888";
  }

  say(text: string, bad = false): void {
    this.message = { text, bad };
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.dismiss(), bad ? 12000 : 4000);
    this.notify();
  }

  dismiss(): void {
    this.message = null;
    this.notify();
  }

  /** Do something that may fail, and say so if it does. */
  async attempt<T>(work: () => Promise<T>, busy = ""): Promise<T | undefined> {
    if (busy) {
      this.busy = busy;
      this.notify();
    }
    try {
      return await work();
    } catch (error) {
      this.say(error instanceof Error ? error.message : String(error), true);
      return undefined;
    } finally {
      if (busy) {
        this.busy = "";
        this.notify();
      }
    }
  }

  // Frames

  /** Go to a frame. While one is on its way only the latest that was asked for is fetched after it. */
  async show(frame: number, force = false): Promise<void> {
    const wanted = Math.min(this.last, Math.max(0, Math.round(frame)));
    if (wanted === this.frame && !force && this.ready) return;
    this.finishStroke();
    this.frame = wanted;
    this.showing++;
    this.notify();
    this.loading ??= this.load().finally(() => (this.loading = null));
    await this.loading;
  }

  private async load(): Promise<void> {
    for (let turn = -1; turn !== this.showing; ) {
      turn = this.showing;
      const { frame } = this;
      const done = await this.attempt(async () => {
        await this.saving;
        const [picture, words, before] = await Promise.all([
          this.bitmap(frame),
          this.api.labels(frame, "shown"),
          this.compare ? this.read(frame, "before") : null,
        ]);
        if (turn !== this.showing) return true;
        this.picture = picture;
        this.pictureFrame = frame;
        this.failed = this.sharpening = -1;
        this.replaceLabels(words);
        this.before = before;
        this.touch(null);
        return true;
      });
      if (!done && turn === this.showing) {
        this.picture = null;
        this.pictureFrame = -1;
        this.failed = frame;
        this.replaceLabels(null);
        this.touch(null);
      }
    }
  }

  /** Take over what the server knows of a frame, in the buffer of the frame before the last: those of 4K are large. */
  private replaceLabels(words: Uint32Array | null): void {
    const { width, height } = this.state;
    const data = this.spare ?? new Uint8Array(width * height);
    if (words) decode(words, width * height, data);
    else data.fill(0);
    this.spare = this.labels.data;
    this.labels = new LabelMap(width, height, data);
  }

  step(by: number): void {
    void this.show(this.frame + by);
  }

  async play(): Promise<void> {
    this.playing = !this.playing;
    this.notify();
    const pause = 1000 / Math.min(60, Math.max(1, this.state.rate));
    while (this.playing && this.frame < this.last) {
      const begun = performance.now();
      await this.show(this.frame + 1);
      await new Promise((done) => setTimeout(done, Math.max(0, pause - (performance.now() - begun))));
    }
    this.playing = false;
    this.notify();
  }

  setCompare(on: boolean): void {
    this.compare = on;
    void this.show(this.frame, true);
  }

  /** Show the frame at its own size, for a close look, when one stays on it. */
  async sharpen(): Promise<void> {
    const { frame } = this;
    if (this.sharpening === frame || this.playing || !this.ready) return;
    this.sharpening = frame;
    await new Promise((done) => setTimeout(done, STILL));
    if (this.sharpening !== frame || !this.ready || this.frame !== frame) return;
    const picture = await this.attempt(() => this.bitmap(frame, "whole"));
    if (picture && this.frame === frame && this.ready) {
      this.picture = picture;
      this.notify();
    }
  }

  private async read(frame: number, layer: Layer): Promise<LabelMap | null> {
    const words = await this.api.labels(frame, layer);
    const { width, height } = this.state;
    return words && new LabelMap(width, height, decode(words, width * height));
  }

  private async bitmap(frame: number, size: "preview" | "whole" = "preview"): Promise<ImageBitmap> {
    const key = `${size} ${frame}`;
    const known = this.pictures.get(key);
    if (known) {
      this.pictures.delete(key);
      this.pictures.set(key, known);
      return known;
    }
    let coming = this.fetching.get(key);
    if (!coming) {
      coming = this.fetchPicture(key, frame, size).finally(() => this.fetching.delete(key));
      this.fetching.set(key, coming);
    }
    return coming;
  }

  private async fetchPicture(key: string, frame: number, size: "preview" | "whole"): Promise<ImageBitmap> {
    const picture = await createImageBitmap(await this.api.picture(frame, size));
    this.pictures.set(key, picture);
    let bytes = 0;
    for (const kept of this.pictures.values()) bytes += kept.width * kept.height * 4;
    for (const [name, kept] of this.pictures) {
      if (bytes <= PICTURE_BYTES) break;
      if (kept === this.picture || kept === picture) continue;
      bytes -= kept.width * kept.height * 4;
      kept.close();
      this.pictures.delete(name);
    }
    return picture;
  }

  /** Free what this holds outside of the page's heap. */
  close(): void {
    this.playing = false;
    this.picture = null;
    for (const picture of this.pictures.values()) picture.close();
    this.pictures.clear();
  }

  // Drawing

  may = (label: number): boolean => !this.protect || label === 0 || label === this.object;

  get value(): number {
    return this.tool === "eraser" ? 0 : this.object;
  }

  beginStroke(): void {
    this.finishStroke();
    if (!this.ready) return;
    const { width, height, data } = this.labels;
    this.stroke = { before: new LabelMap(width, height, data.slice()), rect: null };
  }

  drawStroke(from: Point, to: Point): void {
    this.draw((labels) => labels.stroke(from, to, this.brush / 2, this.value, this.may));
  }

  /** Change the labels within a stroke, or as a stroke of its own. */
  draw(change: (labels: LabelMap) => Rect | null): boolean {
    if (!this.ready) return false;
    const alone = !this.stroke;
    if (alone) this.beginStroke();
    const rect = change(this.labels);
    this.stroke!.rect = union(this.stroke!.rect, rect);
    if (rect) this.touch(rect);
    if (alone) this.finishStroke();
    return rect !== null;
  }

  finishStroke(): void {
    const stroke = this.stroke;
    this.stroke = null;
    if (!stroke?.rect) return;
    const { rect, before } = stroke;
    const frame = this.frame;
    this.history.push({
      frame,
      rect,
      before: before.crop(rect),
      after: this.labels.crop(rect),
      wasMarked: this.marked.includes(frame),
    });
    this.save(frame);
  }

  polygon(corners: Point[]): void {
    if (corners.length >= 3) this.draw((labels) => labels.polygon(corners, this.value, this.may));
  }

  fill(point: Point): void {
    const x = Math.floor(point.x);
    const y = Math.floor(point.y);
    if (!this.ready || !this.labels.contains(x, y)) return;
    const done = this.draw((labels) => labels.flood(x, y, this.object));
    if (!done) this.say("The outline is open: close it with the brush, then fill it.", true);
  }

  async box(from: Point, to: Point): Promise<void> {
    const corners = [from.x, from.y, to.x, to.y].map(Math.round);
    await this.select(() => this.api.box(this.frame, corners), "looking for the object in the box");
  }

  async click(points: { x: number; y: number; on: boolean }[]): Promise<void> {
    const clicks = points.map(({ x, y, on }) => [Math.floor(x), Math.floor(y), on ? 1 : 0]);
    const earlier = clicks.length > 1 ? this.selected : null; // what the clicks before this one selected
    await this.select(() => this.api.click(this.frame, clicks), "looking for the object", earlier);
  }

  private async select(find: () => Promise<Uint32Array | null>, busy: string, instead: Selected | null = null) {
    const frame = this.frame;
    const words = this.ready ? await this.attempt(find, busy) : undefined;
    if (!words || frame !== this.frame || !this.ready) return;
    const mask = decode(words, this.labels.data.length);
    const before = instead?.frame === frame ? instead.before : this.labels.data.slice();
    const done = this.draw((labels) => {
      if (instead?.frame === frame) labels.data.set(before);
      const rect = labels.paint(mask, this.object, this.may);
      return instead ? { left: 0, top: 0, right: labels.width, bottom: labels.height } : rect;
    });
    this.selected = { frame, before };
    if (!done) this.say("Nothing was found there: draw the object with the brush or the polygon.", true);
  }

  async drop(file: File): Promise<void> {
    const { frame } = this;
    const words = await this.attempt(() => this.api.readMask(frame, file), "reading the mask");
    if (!words || frame !== this.frame || !this.ready) return;
    const given = decode(words, this.labels.data.length);
    this.draw((labels) => {
      labels.data.set(given);
      return { left: 0, top: 0, right: labels.width, bottom: labels.height };
    });
    await this.saving;
    await this.refresh();
    this.say(`${file.name} is the mask of frame ${frame} now.`);
  }

  /** Take back the frame's mark: its result, or nothing, is shown again. */
  async clear(): Promise<void> {
    const { frame } = this;
    this.draw((labels) => {
      labels.data.fill(0);
      return { left: 0, top: 0, right: labels.width, bottom: labels.height };
    });
    await this.attempt(async () => {
      await this.saving;
      await this.api.removeMark(frame);
    });
    await this.refresh();
    await this.show(frame, true);
  }

  undo(): void {
    void this.restore(false);
  }

  redo(): void {
    void this.restore(true);
  }

  private async restore(forward: boolean): Promise<void> {
    this.finishStroke();
    const edit = forward ? this.history.redo() : this.history.undo();
    if (!edit) return;
    if (edit.frame !== this.frame || !this.ready) await this.show(edit.frame, true);
    if (this.frame !== edit.frame || !this.ready) return;
    this.labels.put(edit.rect, forward ? edit.after : edit.before);
    this.touch(edit.rect);
    if (!forward && !edit.wasMarked) {
      this.send(() => this.api.removeMark(edit.frame));
      this.state = { ...this.state, marks: this.marked.filter((frame) => frame !== edit.frame) };
      this.notify();
    } else {
      this.save(edit.frame);
    }
  }

  private save(frame: number): void {
    const runs = encode(this.labels.data);
    const first = !this.marked.includes(frame);
    if (first) this.state = { ...this.state, marks: [...this.marked, frame].sort((a, b) => a - b) };
    this.send(() => this.api.writeMark(frame, runs));
    this.notify();
  }

  /** Send a change of a mark after those before it. */
  private send(change: () => Promise<unknown>): void {
    this.pending++;
    this.saving = this.saving
      .then(() => this.attempt(change))
      .then(() => {
        this.pending--;
        this.notify();
      });
  }

  private touch(rect: Rect | null): void {
    const everything = { left: 0, top: 0, right: this.labels.width, bottom: this.labels.height };
    this.changed = union(this.changed, rect ?? everything);
    this.version++;
    this.notify();
  }

  // Objects

  async addObject(): Promise<void> {
    const ids = this.state.objects.map((object) => object.id);
    const id = Array.from({ length: MOST_OBJECTS }, (_, i) => i + 1).find((number) => !ids.includes(number));
    if (id === undefined) return this.say(`There are ${MOST_OBJECTS} objects, as many as a mask can tell apart.`, true);
    await this.writeObjects([...this.state.objects, { id, name: `Object ${id}`, colour: "" }]);
    this.object = id;
    if (this.tool === "eraser") this.tool = "brush";
    this.notify();
  }

  async rename(id: number, name: string): Promise<void> {
    const trimmed = name.trim().slice(0, 80);
    if (!trimmed) return this.notify();
    await this.writeObjects(this.state.objects.map((object) => (object.id === id ? { ...object, name: trimmed } : object)));
  }

  choose(place: number): void {
    const object = this.state.objects[place];
    if (object) {
      this.object = object.id;
      if (this.tool === "eraser" || this.tool === "hand") this.tool = "brush";
      this.notify();
    }
  }

  private async writeObjects(objects: StudioObject[]): Promise<void> {
    await this.attempt(() => this.api.writeObjects(objects));
    await this.refresh();
  }

  // Jobs

  async follow(direction: "all" | "forward" | "backward", until: number | null = null): Promise<void> {
    this.finishStroke();
    this.watch = true;
    const wish = direction === "all" ? { direction } : { direction, frame: this.frame, until };
    await this.attempt(async () => {
      await this.saving;
      for (const job of this.state.jobs) {
        if (job.kind === "follow" && ["running", "waiting", "paused"].includes(job.state)) {
          await this.api.job(job.number, "stop");
        }
      }
      await this.api.submit("follow", wish);
    });
    await this.refresh();
  }

  async job(job: Job, action: "pause" | "resume" | "stop"): Promise<void> {
    this.finishStroke();
    if (action === "resume") this.watch = true;
    await this.attempt(async () => {
      await this.saving;
      const { again } = await this.api.job(job.number, action);
      if (again !== null) this.say(`Frame ${again} was corrected: it is followed again from there. What is before it stays.`);
    });
    await this.refresh();
  }

  async discard(): Promise<void> {
    await this.attempt(() => this.api.discard());
    await this.refresh();
    await this.show(this.frame, true);
  }

  async export(kind: string): Promise<void> {
    await this.attempt(async () => {
      await this.saving;
      await this.api.submit("export", { kind });
    });
    await this.refresh();
  }

  async setSize(size: number): Promise<void> {
    await this.attempt(() => this.api.writeSettings({ size }));
    await this.refresh();
  }

  // The server

  async refresh(): Promise<void> {
    if (this.refreshing) {
      this.again = true;
      return;
    }
    this.refreshing = true;
    do {
      this.again = false;
      const state = await this.attempt(async () => {
        await this.saving;
        return this.api.state();
      });
      if (state) {
        this.state = state;
        this.arrivals++;
      }
    } while (this.again);
    this.refreshing = false;
    this.notify();
  }

  hear(event: ServerEvent): void {
    if (event.type === "again") return void this.refresh();
    if (event.project !== this.state.id) return;
    if (event.type === "project") {
      if (event.by === page) return;
      const idle = this.ready && !this.stroke && this.pending === 0;
      if (idle && (event.frame ?? this.frame) === this.frame) void this.show(this.frame, true);
      return void this.refresh();
    }
    const { job } = event;
    const jobs = this.state.jobs.filter((other) => other.number !== job.number);
    const before = this.state.jobs.find((other) => other.number === job.number);
    this.state = { ...this.state, jobs: [job, ...jobs].sort((a, b) => b.number - a.number) };
    if (event.frame !== undefined) this.arrived(event.frame, event.confidence ?? null);
    if (before?.state !== job.state && job.state !== "running") void this.ended(job);
    this.notify();
  }

  connected(now: boolean): void {
    const back = now && !this.online;
    this.online = now;
    if (back) {
      void this.refresh();
      void this.show(this.frame, true);
    }
    this.notify();
  }

  private arrived(frame: number, confidence: number | null): void {
    const { frames, confidence: known } = this.state;
    const place = lowerBound(frames, frame);
    if (frames[place] === frame) known[place] = confidence;
    else {
      frames.splice(place, 0, frame);
      known.splice(place, 0, confidence);
    }
    this.arrivals++;
    if (this.watch && !this.playing && !this.stroke && this.ready && frame !== this.frame) void this.show(frame);
  }

  private async ended(job: Job): Promise<void> {
    await this.refresh();
    if (job.state === "failed" || (job.state === "paused" && job.message)) this.say(job.message, true);
    if (job.kind === "follow" && job.state !== "waiting") await this.show(this.frame, true);
    if (job.kind === "follow" && job.state === "done") this.say(`Finished: ${job.message}.`);
    if (job.kind === "export" && job.state === "done") this.say(`${job.message} is ready to download.`);
  }
}

export function lowerBound(sorted: number[], value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Draw the component again whenever the store changes. */
export function useStore(store: Store): Store {
  const [, set] = useState(0);
  useEffect(() => store.subscribe(() => set((n) => n + 1)), [store]);
  return store;
}
