"""An OpenAI-compatible HTTP server over `AsyncLLM`. The command is `fastinfer serve`.

    protocol.py    JSON body -> prompts and `SamplingParams`, or one sentence about what is wrong
    responses.py   outputs -> the JSON objects of the API
    app.py         routes, streaming, disconnects
    limits.py      API key, body size, request rate
    exposition.py  /metrics in the text format of Prometheus

Needs the `serve` extra (starlette, uvicorn).
"""
