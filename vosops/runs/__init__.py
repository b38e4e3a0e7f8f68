"""What a run into a folder needs: jobs, checkpoints and resuming, reports, overlays and contact sheets."""
