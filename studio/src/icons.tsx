// Small drawings for buttons, 20 by 20.

const paths = {
  brush: "M3 17c3 .5 5-.5 5-3a2.2 2.2 0 0 0-4.3-.7C3.3 15 3 15.5 2 16c.2.5.5.9 1 1zM8 12l8.5-8.500a1.4 1.4 0 0 1 2 2L10 14",
  eraser: "M7 17h10M11.5 4.500l5 5-6.5 6.500H6.500L3 12.500z M7.5 8.500l5 5",
  polygon: "M4 7l6-4 7 5-2 8H6z M4 7h0M10 3h0M17 8h0M15 16h0M6 16h0",
  fill: "M8 3l8 7-6.5 6L3 10zM8 3v5M17 12c1.5 2 1.5 4 0 4s-1.5-2 0-4z",
  box: "M3 6V3h3M14 3h3v3M17 14v3h-3M6 17H3v-3M7 10a3 3 0 1 0 6 0 3 3 0 1 0-6 0",
  click: "M8 8l8 3-3.5 1.500L11 16zM6 3v2M3 6h2M3.5 3.500l1.5 1.5",
  hand: "M10 2v16M2 10h16M10 2L8 4M10 2l2 2M10 18l-2-2M10 18l2-2M2 10l2-2M2 10l2 2M18 10l-2-2M18 10l-2 2",
  undo: "M4 8h8a4 4 0 0 1 0 8H8M4 8l4-4M4 8l4 4",
  redo: "M16 8H8a4 4 0 0 0 0 8h4M16 8l-4-4M16 8l-4 4",
  play: "M6 4l10 6-10 6z",
  pause: "M6 4v12M13 4v12",
  first: "M5 4v12M16 4l-8 6 8 6z",
  last: "M15 4v12M4 4l8 6-8 6z",
  left: "M12 4l-6 6 6 6",
  right: "M8 4l6 6-6 6",
  fit: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  plus: "M10 4v12M4 10h12",
  minus: "M4 10h12",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 11h6l1-11",
  down: "M10 3v10M6 9l4 4 4-4M4 17h12",
  copy: "M7 7h9v9H7zM4 13V4h9",
  close: "M5 5l10 10M15 5L5 15",
  look: "M2 10c4-6 12-6 16 0-4 6-12 6-16 0zM8 10a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  theme: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
};

export type IconName = keyof typeof paths;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true">
      <path d={paths[name]} />
    </svg>
  );
}
