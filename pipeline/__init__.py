"""The engine: pipeline.yaml -> plan -> run -> versioned artifacts -> report. Knows neither stages nor tensors."""

import os

# Pydantic asks every installed package whether it has a plugin that watches validation. None may look on here, and the
# search is a twentieth of what a listing takes.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
