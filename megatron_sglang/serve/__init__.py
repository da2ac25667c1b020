"""The OpenAI-compatible endpoint, `megatron-sglang serve`: a proxy that lets through what is on its list.

    client -> http.py, guard.py      connections, key, body: who may speak, how much, how slowly
           -> app.py, records.py     routes and what may stand in a request
           -> upstream.py            which engine, whether it may serve, its tokenizer
           -> work.py, gate.py       a place in the queue, the engine, one weight version or none
           -> answers.py             OpenAI's objects

SGLang is never exposed: it listens on loopback, gets token ids and sampling parameters that were built here, and no
other route of it is ever called. docs/serve.md has the routes and limits.
"""
