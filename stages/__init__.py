"""The stages: one file each, in the order of the pipeline.

ticket, train, prune, finetune, export, quantize, benchmark.
"""

import os

# ONNX Runtime's Linux builds send usage data unless told otherwise before their first import (since 1.29). The hub's
# client says which torch runs here, and under which agent, whenever weights are fetched.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
