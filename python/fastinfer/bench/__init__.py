"""Load tests of the engine: workloads, arrivals, reports. The command is `fastinfer bench`."""

BACKENDS = ("fastinfer", "transformers", "vllm")
