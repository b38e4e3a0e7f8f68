import { defineConfig } from "vite";

// Names without hashes, so that a rebuild of the same sources gives the same files: CI compares them.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../vosops/studio/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    rollupOptions: {
      output: {
        entryFileNames: "assets/studio.js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: "assets/studio[extname]",
      },
    },
  },
});
