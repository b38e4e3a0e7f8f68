// What draws, and with what.

import { Icon, type IconName } from "./icons";
import { tellStage } from "./stage";
import { type Store, type Tool, useStore } from "./store";

interface ToolInfo {
  tool: Tool;
  name: string;
  key: string;
  about: string;
}

export const TOOLS: ToolInfo[] = [
  { tool: "brush", name: "Brush", key: "b", about: "Paint the object." },
  { tool: "eraser", name: "Eraser", key: "e", about: "Take paint away." },
  { tool: "polygon", name: "Polygon", key: "p", about: "Click around the object; Enter, a double click or the first corner closes the outline." },
  { tool: "fill", name: "Fill", key: "f", about: "Click inside a painted outline to fill it, or on an object to give it the chosen colour." },
  { tool: "box", name: "Box", key: "g", about: "Drag a box around the object; its shape is found inside." },
  { tool: "click", name: "Click", key: "c", about: "Click on the object; Alt or the right button says what is not part of it." },
  { tool: "hand", name: "Move", key: "h", about: "Drag the picture. The wheel zooms." },
];

function press(store: Store, tool: Tool): void {
  tellStage("cancel");
  store.tool = tool;
  store.notify();
}

export function pressKey(store: Store, key: string): boolean {
  const found = TOOLS.find((entry) => entry.key === key);
  if (!found || (found.tool === "click" && !store.state.click)) return false;
  press(store, found.tool);
  return true;
}

function IconButton(props: { icon: IconName; name: string; keys?: string; disabled?: boolean; act: () => void }) {
  const label = props.keys ? `${props.name} (${props.keys})` : props.name;
  return (
    <button type="button" class="tool" aria-label={props.name} title={label} disabled={props.disabled} onClick={props.act}>
      <Icon name={props.icon} />
    </button>
  );
}

export function Toolbar({ store }: { store: Store }) {
  useStore(store);
  const tools = TOOLS.filter((entry) => entry.tool !== "click" || store.state.click);
  return (
    <div class="toolbar" role="toolbar" aria-label="Drawing tools">
      {tools.map((entry) => (
        <button
          type="button"
          key={entry.tool}
          class="tool"
          aria-label={entry.name}
          aria-pressed={store.tool === entry.tool}
          title={`${entry.name} (${entry.key.toUpperCase()}): ${entry.tool === "click" ? store.state.click : entry.about}`}
          onClick={() => press(store, entry.tool)}
        >
          <Icon name={entry.tool} />
          <span>{entry.name}</span>
        </button>
      ))}
      <hr />
      <IconButton icon="undo" name="Undo" keys="Ctrl-Z" disabled={!store.history.canUndo} act={() => store.undo()} />
      <IconButton icon="redo" name="Redo" keys="Ctrl-Shift-Z" disabled={!store.history.canRedo} act={() => store.redo()} />
      <hr />
      <IconButton icon="plus" name="Zoom in" keys="+" act={() => tellStage("in")} />
      <IconButton icon="minus" name="Zoom out" keys="-" act={() => tellStage("out")} />
      <IconButton icon="fit" name="Fit the frame" keys="0" act={() => tellStage("fit")} />
    </div>
  );
}

export function ToolOptions({ store }: { store: Store }) {
  useStore(store);
  const most = Math.max(40, Math.round(Math.min(store.state.width, store.state.height) / 3));
  const info = TOOLS.find((entry) => entry.tool === store.tool)!;
  const paints = store.tool === "brush" || store.tool === "eraser";
  return (
    <div class="options">
      {paints && (
        <label>
          Size
          <input
            type="range"
            min={1}
            max={most}
            value={store.brush}
            title="Brush size ([ and ])"
            onInput={(event) => {
              store.brush = Number(event.currentTarget.value);
              store.notify();
            }}
          />
          <output>{store.brush} px</output>
        </label>
      )}
      {!paints && <span class="about">{info.about}</span>}
      <label>
        <input
          type="checkbox"
          checked={store.protect}
          onChange={(event) => {
            store.protect = event.currentTarget.checked;
            store.notify();
          }}
        />
        Keep other objects
      </label>
      <label>
        Masks
        <input
          type="range"
          min={0}
          max={100}
          value={store.masks ? store.opacity * 100 : 0}
          title="Opacity of the masks (M hides them)"
          onInput={(event) => {
            store.opacity = Number(event.currentTarget.value) / 100;
            store.masks = true;
            store.notify();
          }}
        />
      </label>
      <label title="Show the borders of the result before the latest one (X)">
        <input type="checkbox" checked={store.compare} onChange={(event) => store.setCompare(event.currentTarget.checked)} />
        Compare with before
      </label>
    </div>
  );
}
