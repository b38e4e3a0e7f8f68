// Label maps: one byte a pixel, 0 for background, as in the masks that the server keeps. Drawing on them, and the form
// in which they travel: runs of equal labels, the label in the upper byte of a word and the length in the other three.

export interface Rect {
  left: number;
  top: number;
  right: number;
  bottom: number;
}

export interface Point {
  x: number;
  y: number;
}

const LONGEST_RUN = 0xffffff;

export function decode(words: Uint32Array, pixels: number, data: Uint8Array = new Uint8Array(pixels)): Uint8Array {
  let place = 0;
  for (const word of words) {
    const length = word & LONGEST_RUN;
    data.fill(word >>> 24, place, place + length);
    place += length;
  }
  if (place !== pixels) throw new Error(`runs must cover ${pixels} pixels, got ${place}`);
  return data;
}

export function encode(data: Uint8Array): Uint32Array<ArrayBuffer> {
  const words: number[] = [];
  let start = 0;
  for (let place = 1; place <= data.length; place++) {
    const ended = place === data.length || data[place] !== data[start];
    if (ended || place - start === LONGEST_RUN) {
      words.push(((data[start] << 24) | (place - start)) >>> 0);
      start = place;
    }
  }
  return Uint32Array.from(words);
}

export function union(a: Rect | null, b: Rect | null): Rect | null {
  if (!a || !b) return a ?? b;
  return {
    left: Math.min(a.left, b.left),
    top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right),
    bottom: Math.max(a.bottom, b.bottom),
  };
}

export class LabelMap {
  readonly data: Uint8Array;

  constructor(
    readonly width: number,
    readonly height: number,
    data?: Uint8Array,
  ) {
    this.data = data ?? new Uint8Array(width * height);
  }

  at(x: number, y: number): number {
    return this.data[y * this.width + x];
  }

  contains(x: number, y: number): boolean {
    return x >= 0 && y >= 0 && x < this.width && y < this.height;
  }

  ids(): number[] {
    const seen = new Uint8Array(256);
    for (const value of this.data) seen[value] = 1;
    return [...seen.keys()].filter((id) => id > 0 && seen[id]);
  }

  /** A stroke of a round brush; `may` says which labels it may replace. Returns what changed. */
  stroke(from: Point, to: Point, radius: number, value: number, may: (label: number) => boolean): Rect | null {
    const rect = this.clip({
      left: Math.floor(Math.min(from.x, to.x) - radius),
      top: Math.floor(Math.min(from.y, to.y) - radius),
      right: Math.ceil(Math.max(from.x, to.x) + radius) + 1,
      bottom: Math.ceil(Math.max(from.y, to.y) + radius) + 1,
    });
    if (!rect) return null;
    const dx = to.x - from.x;
    const dy = to.y - from.y;
    const length = dx * dx + dy * dy;
    const reach = Math.max(radius, 0.5) ** 2;
    for (let y = rect.top; y < rect.bottom; y++) {
      for (let x = rect.left; x < rect.right; x++) {
        const px = x + 0.5 - from.x;
        const py = y + 0.5 - from.y;
        const t = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
        const distance = (px - t * dx) ** 2 + (py - t * dy) ** 2;
        const place = y * this.width + x;
        if (distance <= reach && may(this.data[place])) this.data[place] = value;
      }
    }
    return rect;
  }

  /** The inside of a closed polygon, by its pixels' centres. */
  polygon(corners: Point[], value: number, may: (label: number) => boolean): Rect | null {
    const ys = corners.map((p) => p.y);
    const xs = corners.map((p) => p.x);
    const rect = this.clip({
      left: Math.floor(Math.min(...xs)),
      top: Math.floor(Math.min(...ys)),
      right: Math.ceil(Math.max(...xs)) + 1,
      bottom: Math.ceil(Math.max(...ys)) + 1,
    });
    if (!rect || corners.length < 3) return null;
    for (let y = rect.top; y < rect.bottom; y++) {
      const crossings: number[] = [];
      const row = y + 0.5;
      corners.forEach((a, i) => {
        const b = corners[(i + 1) % corners.length];
        if (a.y <= row !== b.y <= row) crossings.push(a.x + ((row - a.y) / (b.y - a.y)) * (b.x - a.x));
      });
      crossings.sort((a, b) => a - b);
      for (let i = 0; i + 1 < crossings.length; i += 2) {
        const begin = Math.max(rect.left, Math.ceil(crossings[i] - 0.5));
        const end = Math.min(rect.right - 1, Math.floor(crossings[i + 1] - 0.5));
        for (let x = begin; x <= end; x++) {
          const place = y * this.width + x;
          if (may(this.data[place])) this.data[place] = value;
        }
      }
    }
    return rect;
  }

  /** The pixels of one label that are connected to a point; null where background reaches the frame's border. */
  flood(x: number, y: number, value: number): Rect | null {
    const { width, height, data } = this;
    const label = this.at(x, y);
    if (label === value) return { left: x, top: y, right: x, bottom: y };
    const inside = new Uint8Array(data.length);
    const stack = [y * width + x];
    inside[stack[0]] = 1;
    const rect: Rect = { left: x, top: y, right: x + 1, bottom: y + 1 };
    let open = false;
    while (stack.length) {
      const place = stack.pop()!;
      const px = place % width;
      const py = (place - px) / width;
      open ||= px === 0 || py === 0 || px === width - 1 || py === height - 1;
      rect.left = Math.min(rect.left, px);
      rect.right = Math.max(rect.right, px + 1);
      rect.top = Math.min(rect.top, py);
      rect.bottom = Math.max(rect.bottom, py + 1);
      const neighbours = [px > 0 ? place - 1 : -1, px < width - 1 ? place + 1 : -1, place - width, place + width];
      for (const next of neighbours) {
        if (next >= 0 && next < data.length && !inside[next] && data[next] === label) {
          inside[next] = 1;
          stack.push(next);
        }
      }
    }
    if (open && label === 0) return null;
    for (let place = 0; place < data.length; place++) if (inside[place]) data[place] = value;
    return rect;
  }

  /** Give the pixels of a mask a label. */
  paint(mask: Uint8Array, value: number, may: (label: number) => boolean): Rect | null {
    const rect: Rect = { left: this.width, top: this.height, right: 0, bottom: 0 };
    for (let y = 0, place = 0; y < this.height; y++) {
      for (let x = 0; x < this.width; x++, place++) {
        if (!mask[place] || !may(this.data[place])) continue;
        this.data[place] = value;
        if (x < rect.left) rect.left = x;
        if (x >= rect.right) rect.right = x + 1;
        if (y < rect.top) rect.top = y;
        rect.bottom = y + 1;
      }
    }
    return rect.right ? rect : null;
  }

  crop(rect: Rect): Uint8Array {
    const width = rect.right - rect.left;
    const part = new Uint8Array(width * (rect.bottom - rect.top));
    for (let y = rect.top; y < rect.bottom; y++) {
      const row = y * this.width;
      part.set(this.data.subarray(row + rect.left, row + rect.right), (y - rect.top) * width);
    }
    return part;
  }

  put(rect: Rect, part: Uint8Array): void {
    const width = rect.right - rect.left;
    for (let y = rect.top; y < rect.bottom; y++) {
      this.data.set(part.subarray((y - rect.top) * width, (y - rect.top + 1) * width), y * this.width + rect.left);
    }
  }

  private clip(rect: Rect): Rect | null {
    const clipped = {
      left: Math.max(0, rect.left),
      top: Math.max(0, rect.top),
      right: Math.min(this.width, rect.right),
      bottom: Math.min(this.height, rect.bottom),
    };
    return clipped.left < clipped.right && clipped.top < clipped.bottom ? clipped : null;
  }
}

export interface Edit {
  frame: number;
  rect: Rect;
  before: Uint8Array;
  after: Uint8Array;
  /** Whether the frame was marked before this edit: taking the edit back takes the mark back. */
  wasMarked: boolean;
}

const MOST_BYTES = 96 << 20;

/** Edits that can be taken back, on any frame; the oldest are forgotten when they take too much memory. */
export class History {
  private done: Edit[] = [];
  private undone: Edit[] = [];

  push(edit: Edit): void {
    this.done.push(edit);
    this.undone = [];
    let bytes = this.done.reduce((sum, e) => sum + e.before.length + e.after.length, 0);
    while (bytes > MOST_BYTES && this.done.length > 1) {
      const oldest = this.done.shift()!;
      bytes -= oldest.before.length + oldest.after.length;
    }
  }

  undo(): Edit | undefined {
    const edit = this.done.pop();
    if (edit) this.undone.push(edit);
    return edit;
  }

  redo(): Edit | undefined {
    const edit = this.undone.pop();
    if (edit) this.done.push(edit);
    return edit;
  }

  get canUndo(): boolean {
    return this.done.length > 0;
  }

  get canRedo(): boolean {
    return this.undone.length > 0;
  }

  clear(): void {
    this.done = [];
    this.undone = [];
  }
}
