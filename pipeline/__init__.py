"""The engine: pipeline.yaml -> plan -> run -> versioned artifacts -> report. Knows neither stages nor tensors."""
